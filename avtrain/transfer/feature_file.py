"""Vectors of clips in a file: written as they come, and read in parts. Nothing holds all of them.

Rows are read, not mapped into memory: of 128 rows drawn at random a map brings in 130 MB of neighbours, which count as
this process's, and takes longer (1.2 ms for 0.7).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avtrain import ranks
from avtrain.errors import AvtrainError
from avtrain.files import written_as_it_comes
from avtrain.turns import Turns

_PART_BYTES, _PART_ROWS = 1 << 24, 4096  # what is made of rows may be longer than they are
Numbers = NDArray[np.int64]
Found = tuple[Numbers, Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class FeatureFile:
    """A .npy file of records: the number of a clip in its folder, and a float32 vector for each name.

    Attributes:
        path: the file.
        kind: the records' type.
        offset: bytes before them.
        clips: (rows,) of each row; rows of one clip are neighbours, in the order of the folder.
    """

    path: Path
    kind: np.dtype[Any]
    offset: int
    clips: Numbers

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, name: str, rows: Numbers) -> NDArray[np.float32]:
        """(rows, channels) of these rows; neighbours are read at once.

        Raises:
            AvtrainError: the file has been cut meanwhile.
        """
        records = np.empty(len(rows), self.kind)
        bounds = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        with self.path.open("rb") as file:
            for first, end in zip(bounds[:-1], bounds[1:], strict=True):
                wanted = records[first:end].view(np.uint8)
                file.seek(self.offset + int(rows[first]) * self.kind.itemsize if end > first else 0)
                if file.readinto(wanted) != len(wanted):  # type: ignore[arg-type]
                    raise AvtrainError(f"{self.path} was cut while it was read: run the same command again")
        return np.asarray(records[name])


def feature_file(path: Path, channels: Mapping[str, int], clips: int,
                 make: Callable[[], Turns[Found]]) -> FeatureFile:
    """The file, made now if it isn't there or is damaged. Of several processes the first one looks, and writes what
    all of them make.

    Args:
        path: where it is or will be, whole or not at all.
        channels: lengths of the vectors by name.
        clips: how many the folder has.
        make: gives the rows in their order, some at a time: numbers of their clips, and by name (rows, channels).

    Raises:
        AvtrainError: there is something else in its place.
    """
    kind = np.dtype([("clip", "<i8"), *((name, "<f4", (length,)) for name, length in channels.items())])

    def found() -> FeatureFile | None:
        if path.is_file():
            try:
                return _checked(path, kind, clips)
            except ValueError:
                path.unlink()  # damaged: it can be made again
        elif path.exists():
            raise AvtrainError(f"{path} is no file, where features are kept: move it away, or choose another --cache")
        return None

    def written(parts: Iterable[Found]) -> None:
        with written_as_it_comes(path) as file:
            _write(file, kind, parts)

    if (there := ranks.by_first(found)) is not None:
        return there
    make().taken(written)
    return ranks.by_first(lambda: _checked(path, kind, clips))


def _write(file: BinaryIO, kind: np.dtype[Any], parts: Iterable[Found]) -> None:
    rows = 0
    _write_header(file, kind, rows)
    for clips, vectors in parts:
        records = np.empty(len(clips), kind)
        records["clip"] = clips
        for name, tensor in vectors.items():
            records[name] = tensor.numpy()
        file.write(records.tobytes())
        rows += len(clips)
    file.seek(0)
    _write_header(file, kind, rows)  # of the same length: numpy leaves room for any number of rows


def _write_header(file: BinaryIO, kind: np.dtype[Any], rows: int) -> None:
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (rows,)})


def _checked(path: Path, kind: np.dtype[Any], clips: int) -> FeatureFile:
    """The file, all of it looked at once.

    Raises:
        ValueError: it is not such a file, is cut, or holds values that are not finite or clips that are not there.
    """
    with path.open("rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{path}: another version")
        shape, _, found = np.lib.format.read_array_header_1_0(file)
        offset = file.tell()
    if found != kind or len(shape) != 1 or path.stat().st_size != offset + shape[0] * kind.itemsize:
        raise ValueError(f"{path}: other records, or not all of them")
    of_rows = np.empty(shape[0], np.int64)
    with path.open("rb") as file:
        file.seek(offset)
        for part in _slices(shape[0], kind.itemsize):
            records = np.frombuffer(file.read((part.stop - part.start) * kind.itemsize), kind)
            of_rows[part] = records["clip"]
            if not all(np.isfinite(records[name]).all() for name in kind.names or () if name != "clip"):
                raise ValueError(f"{path}: values that are not finite")
    if len(of_rows) and not (of_rows[0] >= 0 and of_rows[-1] < clips and (np.diff(of_rows) >= 0).all()):
        raise ValueError(f"{path}: clips that are not there, or out of order")
    return FeatureFile(path, kind, offset, of_rows)


def _slices(rows: int, row_bytes: int) -> Iterator[slice]:
    """All rows, in parts of `_PART_BYTES` and `_PART_ROWS` at the most."""
    size = max(1, min(_PART_ROWS, _PART_BYTES // max(1, row_bytes)))
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


@dataclass(frozen=True, eq=False)
class FeatureRows:
    """Rows of files as if they were one tensor: `rows[which]` reads (which, channels), float32.

    Attributes:
        files: one after the other.
        name: which of their vectors.
        numbers: (rows,) which rows, counted through all files.
        clips: (rows,) the clip of each, in the joined folder.
        scale: (mean, std) of each channel, which are taken off and divided by.
    """

    files: Sequence[FeatureFile]
    name: str
    numbers: Numbers
    clips: Numbers
    scale: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of_clips(cls, files: Sequence[FeatureFile], name: str, clips: Sequence[int], wanted: Numbers) -> FeatureRows:
        """The rows of the clips that are wanted.

        Args:
            files, name: as above.
            clips: how many the folder of each file has.
            wanted: numbers of clips in all folders, one folder after the other.
        """
        before = np.cumsum([0, *clips])
        of_rows = np.concatenate([file.clips + first for file, first in zip(files, before[:-1], strict=True)])
        chosen = np.zeros(before[-1], bool)
        chosen[wanted] = True
        numbers = np.flatnonzero(chosen[of_rows])
        return cls(files, name, numbers, of_rows[numbers])

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, which: slice | Numbers) -> Tensor:
        numbers = self.numbers[which]
        rows = np.empty((len(numbers), self.channels), np.float32)
        of_file = np.searchsorted(self._firsts, numbers, "right") - 1
        for number in np.unique(of_file).tolist():
            here = of_file == number
            rows[here] = self.files[number].read(self.name, numbers[here] - self._firsts[number])
        found = torch.from_numpy(rows)
        return found if self.scale is None else found.sub_(self.scale[0]).div_(self.scale[1])

    @cached_property
    def _firsts(self) -> Numbers:
        """The number of each file's first row."""
        lengths = [len(file) for file in self.files]
        return np.cumsum([0, *lengths[:-1]])

    @property
    def channels(self) -> int:
        """Length of a row."""
        return int(self.files[0].kind[self.name].shape[0])

    def parts(self) -> Iterator[slice]:
        """All rows, a part at a time."""
        return _slices(len(self), 4 * self.channels)

    def scaled(self, scale: tuple[Tensor, Tensor] | None) -> FeatureRows:
        """The same, as (row - mean) / std; None: as they are."""
        return dataclasses.replace(self, scale=scale)


class ClipMeans:
    """The mean of each clip's rows, as if they were one tensor: `means[first:last]` reads (clips, channels).

    Attributes:
        clips: (clips,) numbers in the joined folder.
    """

    def __init__(self, rows: FeatureRows) -> None:
        self._rows = rows
        self._firsts = np.flatnonzero(np.diff(rows.clips, prepend=-1))
        self._ends = np.append(self._firsts[1:], len(rows))
        self.clips = rows.clips[self._firsts]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, which: slice) -> Tensor:
        firsts, ends = self._firsts[which], self._ends[which]
        means = torch.empty(len(firsts), self._rows.channels)
        longest = int((ends - firsts).max(initial=1))
        for part in _slices(len(firsts), 4 * self._rows.channels * longest):
            counts = torch.from_numpy(ends[part] - firsts[part])
            x = self._rows[slice(int(firsts[part][0]), int(ends[part][-1]))]
            of_rows = torch.arange(len(counts)).repeat_interleave(counts)
            sums = torch.zeros(len(counts), x.shape[1]).index_add(0, of_rows, x)
            means[part] = sums / counts[:, None]
        return means

    def parts(self, at_most: int, at_most_bytes: int) -> Iterator[slice]:
        """All clips, so many at a time, or fewer, so that their means take no more than so many bytes."""
        size = max(1, min(at_most, at_most_bytes // (4 * self._rows.channels)))
        for first in range(0, len(self), size):
            yield slice(first, min(first + size, len(self)))


def mean_and_std(rows: FeatureRows) -> tuple[Tensor, Tensor]:
    """Of each channel, (channels,) float32 each, from the parts' own (Chan et al.); an std is at least 1e-6."""
    count, mean, squares = 0, torch.zeros(rows.channels).double(), torch.zeros(rows.channels).double()
    for part in rows.parts():
        x = rows[part]
        away = x.mean(0).double() - mean
        squares += len(x) * x.std(0, correction=0).double() ** 2 + away**2 * (count * len(x) / (count + len(x)))
        mean += away * (len(x) / (count + len(x)))
        count += len(x)
    return mean.float(), (squares / count).sqrt().float().clamp(min=1e-6)
