"""Joins order, decoding and augmentation: shards -> batches of clips."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from avtrain.config import DataConfig
from avtrain.data.augment import SoundAugmentation, augmented_log_mel, centre_view, pixels, random_view
from avtrain.data.decode import ClipUnreadable, decode_log_mel, decode_parts
from avtrain.data.handover import AHEAD, begin, check_room, in_flight_bytes, packed, unpacked
from avtrain.data.manifest import ClipRow
from avtrain.data.order import ClipPlace
from avtrain.data.shards import ShardFolder, ShardReader
from avtrain.errors import AvtrainError

MOST_UNREADABLE = 0.01


@dataclass
class Batch:
    """Clips of one batch. What is absent is marked in the presence masks and zero in the tensors.

    Attributes:
        visual: (batch, segments, 3, frames, height, width) uint8.
        audio: (batch, segments, 1, mels, frames) float32 log-mel.
        visual_present, audio_present: (batch, segments) boolean.
        labels: indices of each clip's classes.
        keys: of the clips.
        unreadable: one line for every clip that is missing here because it could not be decoded.
    """

    visual: Tensor
    audio: Tensor
    visual_present: Tensor
    audio_present: Tensor
    labels: list[list[int]]
    keys: list[str]
    unreadable: list[str] = field(default_factory=list)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(visual, audio, visual_present, audio_present) on the device."""
        return (self.visual.to(device), self.audio.to(device), self.visual_present.to(device),
                self.audio_present.to(device))


class Supplier(Protocol):
    """What `batches` needs of a dataset, beside what torch's loader asks it for."""

    def batch_bytes(self, at: Sequence[Any]) -> int:
        """How large the batch of what is asked for can be."""


@dataclass(frozen=True)
class _Clip:
    key: str
    visual: Tensor
    audio: Tensor
    visual_present: Tensor
    audio_present: Tensor
    labels: list[int]


def check_spec(folder: ShardFolder, config: DataConfig) -> int:
    """How many stored frames there are for each frame that the model sees.

    Raises:
        AvtrainError: names what the shards have and what the model wants.
    """
    spec = folder.spec
    for name, wanted in (("mel_bands", config.mels), ("mel_frames", config.mel_frames)):
        if spec[name] != wanted:
            raise AvtrainError(f"the shards have {name} {spec[name]}, the model wants {wanted}: set data.mels and "
                               "data.mel_frames to fit, or build other shards")
    step, rest = divmod(int(spec["segment_frames"]), config.segment_frames)
    if rest or not step:
        raise AvtrainError(f"the shards have segments of {spec['segment_frames']} frames, the model wants "
                           f"{config.segment_frames}: data.segment_frames must divide the shards' number")
    return step


class ClipDataset(Dataset[Any]):
    """(place, epoch) -> clip. Map-style: the order is the batch sampler's, and the same on any number of workers.

    Args:
        folder: the shards.
        config: what a clip of the batch looks like.
        seed: with the epoch and the clip's place, decides its view; None: the fixed view of evaluation.
    """

    def __init__(self, folder: ShardFolder, config: DataConfig, seed: int | None) -> None:
        self._step = check_spec(folder, config)
        self._references = self._step % folder.spec.get("reference_step", self._step + 1) == 0
        self._folder, self._config, self._seed = folder, config, seed
        self._sound = SoundAugmentation(config.equalizer, config.noise, config.frequency_shift, config.frequency_mask,
                                        config.time_mask)
        self._reader: ShardReader | None = None

    def __getitems__(self, at: Sequence[tuple[ClipPlace, int]]) -> Batch:
        """A batch, as DataLoader asks for it: pixels go where they stay, and what could not be decoded is left out.

        Raises:
            AvtrainError: not one of the clips could be decoded.
        """
        visual, clips, unreadable = self._room(len(at)), list[_Clip](), list[str]()
        for one in at:
            item = self._item(one, visual[len(clips)])
            clips.append(item) if isinstance(item, _Clip) else unreadable.append(item)
        if not clips:
            raise AvtrainError(f"not one clip of a batch could be decoded; the first: {unreadable[0]}")
        return Batch(visual[:len(clips)], torch.stack([clip.audio for clip in clips]),
                     torch.stack([clip.visual_present for clip in clips]),
                     torch.stack([clip.audio_present for clip in clips]),
                     [clip.labels for clip in clips], [clip.key for clip in clips], unreadable)

    def batch_bytes(self, at: Sequence[tuple[ClipPlace, int]]) -> int:
        """How large the batch of these clips can be."""
        config = self._config
        side = config.crop if config.modality != "audio" else 0
        pixels_bytes = 3 * config.segment_frames * side**2
        return len(at) * config.segments * (pixels_bytes + 4 * config.mels * config.mel_frames)

    def __getitem__(self, at: tuple[ClipPlace, int]) -> _Clip | str:
        return self._item(at, self._room(1)[0])

    def _room(self, clips: int) -> Tensor:
        config = self._config
        side = config.crop if config.modality != "audio" else 0
        # numpy asks for large memory pages, torch does not: filling a new array takes half the time.
        return torch.from_numpy(np.empty((clips, config.segments, 3, config.segment_frames, side, side), np.uint8))

    def _item(self, at: tuple[ClipPlace, int], visual: Tensor) -> _Clip | str:
        """The clip, its pixels written into `visual`; or a line that says why it could not be decoded."""
        place, epoch = at
        self._reader = self._reader or ShardReader(self._folder)  # opened in the worker, not before it is forked
        key, members = self._reader.read(*place, self._config.modality)
        random = None if self._seed is None else np.random.default_rng([self._seed, epoch, *place])
        try:
            return self._clip(self._folder.rows.at(place), members, visual, random)
        except ClipUnreadable as error:
            return f"{self._folder.shards[place.shard].name}: {key}: {error}"

    def _clip(self, row: ClipRow, members: dict[str, bytes], visual: Tensor,
              random: np.random.Generator | None) -> _Clip:
        config, spec = self._config, self._folder.spec
        frames = row.frames if config.modality != "audio" else 0
        mel_frames = row.mel_frames if config.modality != "visual" else 0
        there = max(frames // spec["segment_frames"], mel_frames // spec["mel_frames"], 1)
        count = min(there, config.segments)
        first = int(random.integers(there - count + 1)) if random is not None else 0
        visual_present = self._visual(members.get("mp4"), frames, first, count, visual, random)
        first_mel = first * config.mel_frames
        if random is not None and not frames:  # sound alone is not bound to the pictures' segments
            first_mel = int(random.integers(max(0, mel_frames - count * config.mel_frames) + 1))
        log_mel = members.get("logmel.npy") if mel_frames else None
        audio, audio_present = self._audio(log_mel, first_mel, count, random)
        return _Clip(row.key, visual, audio, visual_present, audio_present, row.labels)

    def _visual(self, mp4: bytes | None, frames: int, first: int, count: int, visual: Tensor,
                random: np.random.Generator | None) -> Tensor:
        """Fills `visual`, (segments, 3, frames, height, width), and says which segments are there."""
        config, length = self._config, int(self._folder.spec["segment_frames"])
        view = (centre_view(config.crop, config.scale) if random is None
                else random_view(config.crop, config.scale, random))
        present = torch.zeros(config.segments, dtype=torch.bool)
        # A video shorter than a segment still gives one: its last frame is held.
        whole = min(count, max(frames // length - first, int(first == 0)))
        if mp4 is None or not frames or whole <= 0:
            visual.zero_()
            return present
        parts = decode_parts(mp4, config.segment_frames, self._step, first * length, (first + whole) * length,
                             self._references)
        filled = 0
        for filled, planes in zip(range(1, whole + 1), parts, strict=False):
            segment, frames = visual[filled - 1], len(planes.luma)
            pixels(planes, view, segment)
            segment[:, frames:] = segment[:, frames - 1:frames]
        visual[filled:whole] = visual[filled - 1, :, -1:]
        visual[whole:] = 0
        present[:whole] = True
        return present

    def _audio(self, log_mel: bytes | None, first: int, count: int,
               random: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """(segments, 1, mels, frames) from frame `first` of the log-mel on, and which segments are there."""
        config = self._config
        audio = torch.zeros(config.segments, 1, config.mels, config.mel_frames)
        present = torch.zeros(config.segments, dtype=torch.bool)
        if log_mel is None:
            return audio, present
        spectrogram = decode_log_mel(log_mel)[:, first:].astype(np.float32)
        whole = min(count, max(spectrogram.shape[1] // config.mel_frames, int(first == 0)))
        if whole <= 0:
            return audio, present
        spectrogram = spectrogram[:, :whole * config.mel_frames]
        # Sound shorter than a segment is filled with zeros, as in the authors' transform.
        spectrogram = np.pad(spectrogram, ((0, 0), (0, whole * config.mel_frames - spectrogram.shape[1])))
        segments = spectrogram.reshape(config.mels, whole, config.mel_frames).transpose(1, 0, 2)
        if random is not None:
            segments = augmented_log_mel(segments, self._sound, random)
        audio[:whole, 0] = torch.from_numpy(np.ascontiguousarray(segments))
        present[:whole] = True
        return audio, present


def _as_it_is(batch: Any) -> Any:
    """`ClipDataset` makes whole batches."""
    return batch


def batches(dataset: Supplier, items: Iterable[list[Any]], workers: int,
            collate: Callable[[Any], Batch] = _as_it_is) -> Iterator[Batch]:
    """The batches in order, made ahead by worker processes (0: in this one).

    Args:
        dataset: of clips or of views.
        items: for every batch what the dataset is asked for: (place or item, epoch), nowhere more than for the first.
            They may go on without end.
        workers: processes.
        collate: makes a batch of what the dataset gives.

    Raises:
        AvtrainError: what a worker can't read, can't hand over, or was ended by.
    """
    items = iter(items)
    first = next(items, None)
    if first is None:
        return
    check_room(in_flight_bytes(dataset.batch_bytes(first), workers))
    loader = DataLoader(
        cast(Dataset[Any], dataset), batch_sampler=itertools.chain([first], items),
        collate_fn=partial(packed, collate) if workers else collate,
        num_workers=workers, prefetch_factor=AHEAD if workers else None,
        worker_init_fn=begin if workers else None,
        # Its own, though nothing here draws from it: a loader would else take a number from the global generator
        # whenever it is made, and a run that is resumed in mid-epoch would go on with other dropout.
        generator=torch.Generator())
    try:
        yield from unpacked(loader) if workers else loader
    except AvtrainError as error:  # a worker's comes with its traceback as text
        raise AvtrainError(str(error).rpartition("AvtrainError: ")[2].strip()) from error


def readable(supply: Iterable[Batch], clips: int) -> Iterator[Batch]:
    """The batches that hold anything; what could not be decoded is counted.

    Args:
        supply: batches of one pass over the data.
        clips: how many the data has.

    Raises:
        AvtrainError: more than 1 % of the clips can't be decoded.
    """
    unreadable = UnreadableCount(clips)
    for batch in supply:
        unreadable.add(batch.unreadable)
        if batch.keys:
            yield batch


class UnreadableCount:
    """Counts clips that could not be decoded over a run.

    Args:
        clips: how many there are an epoch.
    """

    def __init__(self, clips: int) -> None:
        self._most = MOST_UNREADABLE * clips
        self.names: set[str] = set()

    def add(self, unreadable: list[str]) -> None:
        """Remember these.

        Raises:
            AvtrainError: by now they are more than 1 % of the clips; lists them.
        """
        self.names.update(unreadable)
        if len(self.names) > self._most:
            listed = "\n  ".join(sorted(self.names)[:20])
            raise AvtrainError(f"{len(self.names)} clips can't be decoded, more than 1 % of the data: run "
                               f"`avprep verify` and build the shards again.\n  {listed}")
