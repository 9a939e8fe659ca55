"""The dataset: stored clips as the model takes them, whole for pretraining, in evenly spaced views for transfer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from avtrain.config import DataConfig
from avtrain.data.ahead import fetched_ahead
from avtrain.data.augment import SoundAugmentation, View, augmented_log_mel, pixels, random_view
from avtrain.data.decode import ClipUnreadable, Planes, decode_frames, decode_log_mel, decode_parts
from avtrain.data.loader import Batch
from avtrain.data.manifest import ClipRow
from avtrain.data.order import Wanted
from avtrain.data.presence import presence, starts_possible
from avtrain.data.shards import ShardFolder, ShardReader
from avtrain.data.stream import StreamReader
from avtrain.data.views import Views, start_frames
from avtrain.errors import AvtrainError, Unreadable


def check_spec(folder: ShardFolder, config: DataConfig) -> int:
    """How many stored frames there are for each frame that the model sees.

    Raises:
        AvtrainError: names what the shards have and what the model wants.
    """
    spec = folder.spec
    for name, wanted in (("mel_bands", config.mels), ("mel_frames", config.mel_frames)):
        if spec.get(name) != wanted:
            raise AvtrainError(f"the shards have {name} {spec.get(name)}, the model wants {wanted}: set data.mels and "
                               "data.mel_frames to fit, or build other shards")
    length = int(spec.get("segment_frames", 0))
    step, rest = divmod(length, config.segment_frames)
    if rest or not step:
        raise AvtrainError(f"the shards have segments of {length} frames, the model wants "
                           f"{config.segment_frames}: data.segment_frames must divide the shards' number")
    return step


class ClipDataset(Dataset[Any]):
    """(place, epoch) or (place, epoch, part) -> batch. Map-style: the order is the batch sampler's, and the same on any
    number of workers.

    Args:
        folder: the shards.
        config: what a segment looks like, and how many a row has.
        seed: with the epoch, the clip's place and the part decides what is drawn; None: the fixed view of evaluation.
        views: a row, or several, of evenly spaced views; None: one row of the segments one after the other.
    """

    def __init__(self, folder: ShardFolder, config: DataConfig, seed: int | None, views: Views | None = None) -> None:
        self._step = check_spec(folder, config)
        self._references = self._step % folder.spec.get("reference_step", self._step + 1) == 0
        self.folder, self.config, self.views, self._seed = folder, config, views, seed
        self._modality = views.modality if views else config.modality
        self._length = int(folder.spec["segment_frames"])
        self._sound = views.sound if views else SoundAugmentation(
            config.equalizer, config.noise, config.frequency_shift, config.frequency_mask, config.time_mask)
        self._crops = views.crops if views and seed is None else 1
        self._side = config.scale[0] if views and views.whole and seed is None else config.crop
        self._streams = config.order == "stream" and seed is not None and views is None
        self._reader: ShardReader | StreamReader | None = None
        self.timeout_s = config.timeout_s

    def __getitem__(self, at: tuple[Any, ...]) -> Batch:
        return self.__getitems__([at])

    def __getitems__(self, at: Sequence[tuple[Any, ...]], begins: Callable[[int], object] = int) -> Batch:
        """A batch, as DataLoader asks for it: pixels go where they stay. What can't be decoded is left out; there may
        be nothing else. `begins` is told each clip's place in the batch."""
        wanted = [Wanted(*one) for one in at]
        batch, filled = self._room(sum(self._rows(one) for one in wanted), self._segments(wanted[0])), 0
        for place, one in enumerate(wanted):
            begins(place)
            row, rows = self.folder.rows.at(one.place), slice(filled, filled + self._rows(one))
            try:
                self._fill(row, one, batch.visual[rows], batch.audio[rows], batch.visual_present[rows],
                           batch.audio_present[rows])
            except (ClipUnreadable, ValueError) as error:
                batch.unreadable.append(Unreadable(self.folder.shards[one.place.shard].name, row.key, str(error)))
                continue
            filled = rows.stop
            batch.keys += [row.key] * self._rows(one)
            batch.labels += [row.labels] * self._rows(one)
            batch.places += [place] * self._rows(one)
        visual_present, audio_present = batch.visual_present[:filled], batch.audio_present[:filled]
        return Batch(_there(batch.visual[:filled], visual_present), _there(batch.audio[:filled], audio_present),
                     visual_present, audio_present, batch.labels, batch.keys, batch.places, batch.unreadable, len(at))

    def presence(self, wanted: Wanted) -> NDArray[np.bool_]:
        """(2, segments): which segments of a whole clip have picture, and which sound, once it can be read."""
        return self._there(self.folder.rows.at(wanted.place))

    def name_of(self, one: tuple[Any, ...]) -> str:
        """A clip's name, for messages."""
        wanted = Wanted(*one)
        return f"{self.folder.shards[wanted.place.shard].name}: {self.folder.rows.at(wanted.place).key}"

    def batch_bytes(self, at: Sequence[tuple[Any, ...]]) -> int:
        """How large the batch of what is wanted can be."""
        config, side = self.config, self._side if self._modality != "audio" else 0
        segments = sum(self._rows(one) * self._segments(one) for one in (Wanted(*place) for place in at))
        sound = 4 * config.mels * config.mel_frames if self._modality != "visual" else 0
        return segments * (3 * config.segment_frames * side**2 + sound)

    def ahead(self, items: Iterable[Sequence[Any]]) -> Iterator[Sequence[Any]]:
        """The items as they are; the shards that they need next are being fetched, where they lie in a store."""
        return iter(items) if self._streams else fetched_ahead(items, self.folder.shards)

    def _starts_of(self, wanted: Wanted) -> int:
        """How many segments are taken of a clip."""
        if self.views is None:
            return self.config.segments
        alone = wanted.part is not None or self.views.random_start and self._seed is not None
        return 1 if alone else self.views.clips

    def _segments(self, wanted: Wanted) -> int:
        """How many of them share a row."""
        return self._starts_of(wanted) if self.views is None or self.views.sequence else 1

    def _rows(self, wanted: Wanted) -> int:
        """How many rows they make."""
        return self._crops * self._starts_of(wanted) // self._segments(wanted)

    def _room(self, rows: int, segments: int) -> Batch:
        config, side = self.config, self._side if self._modality != "audio" else 0
        # numpy asks for large memory pages, torch does not: filling a new array takes half the time.
        visual = torch.from_numpy(np.empty((rows, segments, 3, config.segment_frames, side, side), np.uint8))
        audio = torch.zeros(rows, segments, 1, config.mels, config.mel_frames)
        present = torch.zeros(2, rows, segments, dtype=torch.bool)
        return Batch(visual, audio, present[0], present[1], [], [])

    def _fill(self, row: ClipRow, wanted: Wanted, visual: Tensor, audio: Tensor, visual_present: Tensor,
              audio_present: Tensor) -> None:
        """Write a clip's views into its rows of a batch, where sound and presence are still zero.

        Raises:
            ClipUnreadable: it can't be decoded; only `visual` has been written to.
        """
        self._reader = self._reader or self._opened()  # in the worker, not before it is forked
        _, members = self._reader.read(*wanted.place, self._modality)
        random = None if self._seed is None else np.random.default_rng(self._entropy(wanted))
        starts = self._starts(row, wanted.part, random)
        columns = (self._crops, self._starts_of(wanted))
        seen = self._seen(row, starts) if "mp4" in members else []
        squares = self._squares(random)
        self._write_pixels(members.get("mp4"), seen, squares, visual.view(*columns, *visual.shape[2:]))
        if "logmel.npy" in members and row.mel_frames:
            segments, there = self._heard(row, members["logmel.npy"], starts, random)
            audio.view(*columns, *audio.shape[2:])[:, :len(segments), 0] = segments
            audio_present.view(columns)[:, :len(segments)] = there
        visual_present.view(columns)[:, :len(seen)] = True

    def _opened(self) -> ShardReader | StreamReader:
        return StreamReader(self.folder, 2 * self.config.stream_buffer) if self._streams else ShardReader(self.folder)

    def _entropy(self, wanted: Wanted) -> list[int]:
        assert self._seed is not None
        parts = [] if self.views is None else [0 if wanted.part is None else 1 + wanted.part]
        return [self._seed, wanted.epoch, *wanted.place, *parts]

    def _starts(self, row: ClipRow, part: int | None, random: Generator | None) -> list[int]:
        """The stored frame that each segment starts with, where picture or sound is there."""
        if self.views is None:
            first = int(random.integers(starts_possible(row, self.config, self._length))) if random is not None else 0
            return [(first + number) * self._length for number in range(self._there(row).any(0).sum())]
        seen = row.frames if self._modality != "audio" else 0
        length = seen or row.mel_frames * self._length // self.config.mel_frames
        if random is not None and self.views.random_start:
            return [int(random.integers(max(0, length - self._length) + 1))]
        starts = start_frames(length, self._length, self.views.clips)
        return starts if part is None else starts[part:part + 1]

    def _there(self, row: ClipRow) -> NDArray[np.bool_]:
        """`presence` of a whole clip's segments."""
        return presence(row, self.config, self._length)

    def _seen(self, row: ClipRow, starts: list[int]) -> list[int]:
        """The starts of the segments that have a picture; the last one's last frame may have to be held."""
        if self.views is not None:
            return starts if row.frames else []
        return starts[:self._there(row)[0].sum()]

    def _squares(self, random: Generator | None) -> list[View]:
        """The crops: one that is drawn, or the fixed ones."""
        if random is not None:
            return [random_view(self.config.crop, self.config.scale, random)]
        size = min(1.0, self._side / self.config.scale[0])
        return [View(size, place, place, False) for place in ((0.5,) if self._crops == 1 else (0.0, 0.5, 1.0))]

    def _write_pixels(self, mp4: bytes | None, starts: list[int], squares: list[View], visual: Tensor) -> None:
        """Fill (crops, segments, 3, frames, height, width) with the segments that start there, the rest with zeros."""
        visual[:, len(starts):] = 0
        column = -1
        for column, planes in enumerate(self._planes(mp4, starts) if mp4 is not None and starts else ()):
            frames = len(planes.luma)
            for crop, square in enumerate(squares):
                segment = visual[crop, column]
                pixels(planes, square, segment)
                segment[:, frames:] = segment[:, frames - 1:frames]  # the last frame is held
        if column + 1 < len(starts):
            raise ClipUnreadable("its video is shorter than its manifest says")

    def _planes(self, mp4: bytes, starts: list[int]) -> Iterator[Planes]:
        """The frames of each segment, until there are none."""
        last = starts[-1] + self._length
        if self.views is None:
            yield from decode_parts(mp4, self.config.segment_frames, self._step, starts[0], last, self._references)
            return
        whole = decode_frames(mp4, 1, starts[0], last)  # once: views overlap
        for start in starts:
            inside = slice(start - starts[0], start - starts[0] + self._length, self._step)
            if not len(whole.luma[inside]):
                return
            yield Planes(whole.luma[inside], whole.chroma[inside], whole.bt709)

    def _heard(self, row: ClipRow, log_mel: bytes, starts: list[int],
               random: Generator | None) -> tuple[Tensor, Tensor]:
        """(segments, mels, frames), and of each whether it is there: half of it, or all there is."""
        length, total = self.config.mel_frames, row.mel_frames
        firsts = [round(start * length / self._length) for start in starts]
        least = min(total, (length + 1) // 2)
        if self.views is None:
            firsts = firsts[:self._there(row)[1].sum()]
            if random is not None and (self._modality == "audio" or not row.frames):  # not bound to pictures' segments
                first = int(random.integers(max(0, total - len(firsts) * length) + 1))
                firsts = [first + number * length for number in range(len(firsts))]
        spectrogram = decode_log_mel(log_mel)
        if spectrogram.shape != (self.config.mels, total):
            raise ClipUnreadable(f"its log-mel has {' x '.join(map(str, spectrogram.shape))} values, its row says "
                                 f"{total} frames")
        segments: NDArray[np.float32] = np.zeros((len(firsts), self.config.mels, length), np.float32)
        for segment, first in zip(segments, firsts, strict=True):
            # Sound shorter than a segment is filled with zeros, as in the authors' transform.
            there = spectrogram[:, first:first + length]
            segment[:, :there.shape[1]] = there
        if random is not None:
            segments = augmented_log_mel(segments, self._sound, random)
        return torch.from_numpy(segments), torch.tensor([total - first >= least for first in firsts], dtype=torch.bool)


def _there(values: Tensor, present: Tensor) -> Tensor:
    """(rows, segments, ...) -> (there, ...); nothing is copied where all are."""
    flat = values.flatten(0, 1)
    return flat if bool(present.all()) else flat[present.flatten()]
