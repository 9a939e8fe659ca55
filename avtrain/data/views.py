"""Views for transfer: evenly spaced clips of a video, one segment long each, and crops of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from avtrain.config import DataConfig
from avtrain.data.augment import SoundAugmentation, View, augmented_log_mel, pixels, random_view
from avtrain.data.decode import ClipUnreadable, Planes, decode_frames, decode_log_mel
from avtrain.data.loader import Batch, check_spec
from avtrain.data.manifest import ClipRow
from avtrain.data.order import ClipPlace
from avtrain.data.shards import ShardFolder, ShardReader


@dataclass(frozen=True)
class Views:
    """Which views of a stored clip are taken.

    Attributes:
        modality: visual, audio or both: what else there is is absent.
        clips: evenly spaced clips, each one segment long.
        crops: 1, the centre (in training: a random one); 3, left, centre and right, or top, centre and bottom.
        whole: in the test, squares are the whole short side, `scale[0]` pixels; else its centre, `crop` pixels.
        sequence: the clips are the segments of one row, for the Transformers; else each is a row.
        random_start: in training, a clip starts anywhere instead.
        sound: in training, what happens to the log-mel.
    """

    modality: str
    clips: int
    crops: int = 1
    whole: bool = True
    sequence: bool = False
    random_start: bool = False
    sound: SoundAugmentation = SoundAugmentation()


class ViewItem(NamedTuple):
    """One stored clip, and which of its evenly spaced clips: all of them (None), or one."""

    place: ClipPlace
    part: int | None = None


def start_frames(length: int, segment: int, count: int) -> list[int]:
    """Where clip i of `count` starts: (i / (count - 1)) x (length - segment), in frames; one alone is in the middle."""
    room = max(0, length - segment)
    return [round((i / (count - 1) if count > 1 else 0.5) * room) for i in range(count)]


@dataclass(frozen=True)
class _Rows:
    """The views of one item: tensors as in `Batch`, one row a sequence."""

    key: str
    labels: list[int]
    visual: Tensor
    audio: Tensor
    visual_present: Tensor
    audio_present: Tensor


class ViewDataset(Dataset[Any]):
    """(item, epoch) -> rows of views.

    Args:
        folder: the shards.
        config: frames of a segment, pixels, mel bands: what the model takes.
        views: which views.
        seed: with epoch and item decides crops, flips, masks and random starts, of `config.crop` pixels; None: the
            fixed views of the test.
    """

    def __init__(self, folder: ShardFolder, config: DataConfig, views: Views, seed: int | None) -> None:
        self._step = check_spec(folder, config)
        self.folder, self.config, self.views, self._seed = folder, config, views, seed
        self._reader: ShardReader | None = None

    def batch_bytes(self, at: Sequence[tuple[ViewItem, int]]) -> int:
        """How large the batch of these items can be."""
        config, views, crops = self.config, self.views, 1 if self._seed is not None else self.views.crops
        side = 0 if views.modality == "audio" else config.crop if self._seed is not None or not views.whole \
            else config.scale[0]
        starts = sum(views.clips if item.part is None else 1 for item, _ in at)
        heard = 4 * config.mels * config.mel_frames if views.modality != "visual" else 0
        return starts * crops * (3 * config.segment_frames * side**2 + heard)

    def __getitem__(self, at: tuple[ViewItem, int]) -> _Rows | str:
        item, epoch = at
        self._reader = self._reader or ShardReader(self.folder)  # opened in the worker, not before it is forked
        key, members = self._reader.read(*item.place, self.views.modality)
        random = (None if self._seed is None else
                  np.random.default_rng([self._seed, epoch, *item.place, 0 if item.part is None else 1 + item.part]))
        try:
            return self._rows(self.folder.rows.at(item.place), members, item.part, random)
        except ClipUnreadable as error:
            return f"{self.folder.shards[item.place.shard].name}: {key}: {error}"

    def _rows(self, row: ClipRow, members: dict[str, bytes], part: int | None,
              random: np.random.Generator | None) -> _Rows:
        views, spec = self.views, self.folder.spec
        segment = int(spec["segment_frames"])
        heard = row.mel_frames * segment // int(spec["mel_frames"])
        seen = row.frames if views.modality != "audio" else 0
        starts = start_frames(seen or heard, segment, views.clips)
        if random is not None and views.random_start:
            starts = [int(random.integers(max(0, (seen or heard) - segment) + 1))]
        elif part is not None:
            starts = starts[part:part + 1]
        visual, visual_present = self._visual(members.get("mp4") if seen else None, row.frames, starts, random)
        mel = members.get("logmel.npy") if views.modality != "visual" else None
        audio, audio_present = self._audio(mel, starts, random)
        # (crops, starts, ...) -> (rows, segments, ...)
        rows = (visual.shape[0], len(starts)) if views.sequence else (visual.shape[0] * len(starts), 1)
        audio = audio.expand(visual.shape[0], *audio.shape)
        present = [mask.expand(visual.shape[0], -1).reshape(rows) for mask in (visual_present, audio_present)]
        return _Rows(row.key, row.labels, visual.reshape(*rows, *visual.shape[2:]),
                     audio.reshape(*rows, *audio.shape[2:]), *present)

    def _visual(self, mp4: bytes | None, frames: int, starts: list[int],
                random: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """(crops, starts, 3, frames, height, width) and, for each start, whether it is there."""
        config, segment = self.config, int(self.folder.spec["segment_frames"])
        if random is not None:
            size, squares = config.crop, [random_view(config.crop, config.scale, random)]
        else:
            size = config.scale[0] if self.views.whole else config.crop
            middle = (0.5,) if self.views.crops == 1 else (0.0, 0.5, 1.0)
            squares = [View(size / config.scale[0], place, place, False) for place in middle]
        size = size if self.views.modality != "audio" else 0
        visual = torch.zeros(len(squares), len(starts), 3, config.segment_frames, size, size, dtype=torch.uint8)
        if mp4 is None:
            return visual, torch.zeros(len(starts), dtype=torch.bool)
        whole = decode_frames(mp4, 1, starts[0], min(starts[-1] + segment, frames))  # once: clips overlap
        for column, start in enumerate(starts):
            inside = slice(start - starts[0], start - starts[0] + segment, self._step)
            planes = Planes(whole.luma[inside], whole.chroma[inside], whole.bt709)
            if not len(planes.luma):
                raise ClipUnreadable("its video is shorter than its manifest says")
            for row, square in enumerate(squares):
                rgb, frames = visual[row, column], len(planes.luma)
                pixels(planes, square, rgb)
                rgb[:, frames:] = rgb[:, frames - 1:frames]  # a video shorter than a segment: its last frame is held
        return visual, torch.ones(len(starts), dtype=torch.bool)

    def _audio(self, log_mel: bytes | None, starts: list[int],
               random: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """(starts, 1, mels, frames) and, for each start, whether at least half of it is there (or all there is)."""
        config, spec = self.config, self.folder.spec
        present = torch.zeros(len(starts), dtype=torch.bool)
        if log_mel is None:
            length = config.mel_frames if self.views.modality != "visual" else 0
            return torch.zeros(len(starts), 1, config.mels, length), present
        spectrogram = decode_log_mel(log_mel).astype(np.float32)
        segments: NDArray[np.float32] = np.zeros((len(starts), config.mels, config.mel_frames), np.float32)
        for column, start in enumerate(starts):
            first = round(start * config.mel_frames / spec["segment_frames"])
            there = spectrogram[:, first:first + config.mel_frames]
            # Sound shorter than a segment is filled with zeros, as in the authors' transform.
            segments[column, :, :there.shape[1]] = there
            present[column] = there.shape[1] >= max(1, min(config.mel_frames // 2, spectrogram.shape[1]))
        if random is not None:
            segments = augmented_log_mel(segments, self.views.sound, random)
        return torch.from_numpy(segments)[:, None], present


def collate_rows(items: Sequence[_Rows | str]) -> Batch:
    """One batch of all rows, leaving out what could not be decoded; maybe without any."""
    good = [item for item in items if isinstance(item, _Rows)]
    unreadable = [item for item in items if isinstance(item, str)]
    if not good:
        nothing = torch.empty(0)
        return Batch(nothing, nothing, nothing, nothing, [], [], unreadable)
    return Batch(torch.cat([item.visual for item in good]), torch.cat([item.audio for item in good]),
                 torch.cat([item.visual_present for item in good]), torch.cat([item.audio_present for item in good]),
                 [item.labels for item in good for _ in item.visual], [item.key for item in good for _ in item.visual],
                 unreadable)

