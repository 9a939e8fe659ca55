"""The manifest beside the shards, clips.parquet: one row a clip (shards/README.md). Checked, and held as columns."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from avtrain.data.order import ClipPlace
from avtrain.errors import AvtrainError, in_a_line

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "clips.parquet"
MEMBERS = ("mp4", "logmel.npy")
TAR_BLOCK = 512  # bytes of a tar's header, which stands before each member; members start at multiples of it
_COLUMN_OF = {"mp4": "mp4", "logmel.npy": "logmel", "json": "json"}
_PLACES = [f"{column}_{what}" for column in _COLUMN_OF.values() for what in ("offset", "size")]
_READ = ["key", "shard", "start_s", "end_s", "labels", "frames", "mel_frames", *_PLACES]
_NULLABLE = {name for name in _PLACES if not name.startswith("json")}
_TEXTS, _LONGEST_TEXT, _MOST_LABELS = ["key", "shard"], 1000, 10_000
_MOST_MEMBER_BYTES = 1 << 30
_CLIP_NUMBER = re.compile(r"-\d{4,}$")
_AGAIN = "build the split again with `avprep build`"


def schema() -> pa.Schema:
    """All columns of the file, with their types."""
    import pyarrow as pa

    strings, floats = pa.list_(pa.string()), pa.list_(pa.float64())
    return pa.schema([
        ("key", pa.string()), ("source", pa.string()), ("shard", pa.string()), ("start_s", pa.float64()),
        ("end_s", pa.float64()), ("labels", pa.list_(pa.int32())), ("label_times_s", pa.list_(floats)),
        ("frames", pa.int32()), ("width", pa.int32()), ("height", pa.int32()), ("sound_s", pa.float64()),
        ("mel_frames", pa.int32()), ("missing", strings), ("marks", strings),
        *((name, pa.int64()) for name in _PLACES)])


class Member(NamedTuple):
    """Where a file's content lies in a tar."""

    offset: int
    size: int


class ClipRow(NamedTuple):
    """What the manifest says of one stored clip: where it is, its labels, frames of picture and of log-mel, and from
    when to when it lies in its source."""

    place: ClipPlace
    key: str
    labels: list[int]
    frames: int
    mel_frames: int
    start_s: float
    end_s: float

    @property
    def video(self) -> str:
        """The source that the clip was cut from; a long one gives several clips."""
        return video_of(self.key)

    @property
    def length_s(self) -> float:
        """Seconds."""
        return self.end_s - self.start_s


def video_of(key: str) -> str:
    """The source of a clip, from the clip's key."""
    return _CLIP_NUMBER.sub("", key)


@dataclass(frozen=True)
class _Columns:
    """The rows of all shards, in their order. Arrays, which forked workers share; no object a clip.

    Attributes:
        keys: a pyarrow array of strings.
        shards: (rows,) int32, each row's shard number.
        first_rows: (shards,) int64, each shard's first row.
        labels, label_ends: those of all rows in a line, int32, and where each row's end, (1 + rows,) int64 from 0.
        frames, mel_frames: (rows,) int32.
        start_s, end_s: (rows,) float64.
        offsets, sizes: (rows, 2) int64, of `MEMBERS`; -1 where there is none.
    """

    keys: Any
    shards: NDArray[np.int32]
    first_rows: NDArray[np.int64]
    labels: NDArray[np.int32]
    label_ends: NDArray[np.int64]
    frames: NDArray[np.int32]
    mel_frames: NDArray[np.int32]
    start_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]


class ClipRows(Sequence[ClipRow]):
    """Rows of the manifests of one or several folders, all or some; an object is made when a row is asked for."""

    def __init__(self, columns: _Columns, numbers: NDArray[np.int64]) -> None:
        self._columns, self._numbers = columns, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> ClipRow: ...

    @overload
    def __getitem__(self, index: slice) -> ClipRows: ...

    def __getitem__(self, index: int | slice) -> ClipRow | ClipRows:
        if isinstance(index, slice):
            return ClipRows(self._columns, self._numbers[index])
        return self._row(int(self._numbers[index]))

    def at(self, place: ClipPlace) -> ClipRow:
        """The row of the clip that is stored there, whether it is among these rows or not."""
        return self._row(self._number(place))

    def members(self, place: ClipPlace) -> dict[str, Member]:
        """Where picture and sound of the clip that is stored there lie in the tar, by ending, if there are any."""
        number, columns = self._number(place), self._columns
        places = zip(MEMBERS, columns.offsets[number].tolist(), columns.sizes[number].tolist(), strict=True)
        return {ending: Member(offset, size) for ending, offset, size in places if offset >= 0}

    def taken(self, which: Sequence[int] | NDArray[Any]) -> ClipRows:
        """Some of these rows, by their numbers here or as a mask."""
        return ClipRows(self._columns, self._numbers[np.asarray(which)])

    def numbers(self) -> NDArray[np.int64]:
        """Of each row, among all of its folders'."""
        return self._numbers

    def keys(self) -> list[str]:
        """Of each row."""
        return list(self._columns.keys.take(self._numbers).to_pylist())

    def labels(self) -> list[list[int]]:
        """Of each row."""
        values, ends = self._columns.labels, self._columns.label_ends
        firsts, counts = ends[self._numbers], ends[self._numbers + 1] - ends[self._numbers]
        # The chosen rows' values in a line: each row's place in it, moved to where its values are.
        places = np.arange(counts.sum()) + np.repeat(firsts - counts.cumsum() + counts, counts)
        chosen = iter(values[places].tolist())
        return [list(islice(chosen, count)) for count in counts.tolist()]

    def have_label(self) -> NDArray[np.bool_]:
        """(rows,): whether there is any."""
        ends = self._columns.label_ends
        return np.asarray(ends[self._numbers + 1] > ends[self._numbers])

    def have(self, modality: str) -> NDArray[np.bool_]:
        """(rows,): whether there is anything to see or hear, as the modality (visual, audio or both) wants it."""
        seen, heard = (of_all[self._numbers] > 0 for of_all in (self._columns.frames, self._columns.mel_frames))
        return np.asarray({"visual": seen, "audio": heard}.get(modality, seen | heard))

    def _number(self, place: ClipPlace) -> int:
        return int(self._columns.first_rows[place[0]]) + place[1]

    def _row(self, number: int) -> ClipRow:
        columns = self._columns
        shard = int(columns.shards[number])
        labels = columns.labels[columns.label_ends[number]:columns.label_ends[number + 1]].tolist()
        return ClipRow(ClipPlace(shard, number - int(columns.first_rows[shard])), columns.keys[number].as_py(), labels,
                       int(columns.frames[number]), int(columns.mel_frames[number]), float(columns.start_s[number]),
                       float(columns.end_s[number]))


def rows_of(table: pa.Table, clips_of_shards: Sequence[int]) -> ClipRows:
    """The rows of a checked table, as those of shards with so many clips."""
    clips = np.asarray(clips_of_shards, np.int64)
    labels = table["labels"].combine_chunks()
    columns = _Columns(
        table["key"].combine_chunks(), np.repeat(np.arange(len(clips), dtype=np.int32), clips), clips.cumsum() - clips,
        labels.flatten().to_numpy(), np.concatenate(([0], labels.value_lengths().to_numpy().cumsum(dtype=np.int64))),
        *(table[name].to_numpy() for name in ("frames", "mel_frames", "start_s", "end_s")),
        *(np.stack([_integers(table, f"{_COLUMN_OF[ending]}_{what}") for ending in MEMBERS], 1)
          for what in ("offset", "size")))
    return ClipRows(columns, np.arange(len(table)))


def joined_rows(parts: Sequence[ClipRows]) -> ClipRows:
    """All rows of the folders that these are of, one folder after the other."""
    import pyarrow as pa

    columns = [part._columns for part in parts]

    def together(name: str, places_in: str | None = None) -> NDArray[Any]:
        """A column of all parts; where it holds places in another one, these go on from part to part."""
        arrays = [getattr(of_part, name) for of_part in columns]
        if places_in is not None:
            before = np.cumsum([0, *(len(getattr(of_part, places_in)) for of_part in columns[:-1])])
            arrays = [array + array.dtype.type(count) for array, count in zip(arrays, before, strict=True)]
        return np.concatenate(arrays)

    labels_of_rows = np.concatenate([np.diff(of_part.label_ends) for of_part in columns])
    rows = _Columns(
        pa.concat_arrays([of_part.keys for of_part in columns]), together("shards", "first_rows"),
        together("first_rows", "keys"), together("labels"), np.concatenate(([0], labels_of_rows.cumsum())),
        *map(together, ("frames", "mel_frames", "start_s", "end_s", "offsets", "sizes")))
    return ClipRows(rows, np.arange(len(rows.keys)))


def _integers(table: pa.Table, name: str) -> NDArray[np.int64]:
    """(rows,): a column of integers; -1 for null."""
    return np.asarray(table[name].fill_null(-1).to_numpy())


def parsed(source: str | bytes, clips: int) -> pa.Table:
    """The columns that are used here, of a file or of its content, which must have so many rows.

    Raises:
        ValueError: it is no Parquet file, has more or fewer rows, or lacks a column or has it with another type.
        OSError: the file can't be read.
    """
    import pyarrow as pa

    try:  # no threads: worker processes are forked afterwards
        with _opened(source) as file:
            found, wanted = file.schema_arrow, schema()
            wrong = [field.name for field in wanted
                     if field.name not in found.names or not found.field(field.name).type.equals(field.type)]
            if wrong:
                raise ValueError(f"no column {', '.join(wrong)} as it must be")
            if file.metadata.num_rows != clips:
                raise ValueError(f"{file.metadata.num_rows} rows, where the index has {clips} clips")
            _check_lengths(source, file.metadata)
            table = file.read(_READ, use_threads=False)
            pa.default_memory_pool().release_unused()
            return table
    except pa.ArrowException as error:
        raise ValueError(in_a_line(error)) from error


def _opened(source: str | bytes, **options: Any) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.ParquetFile(pa.BufferReader(source) if isinstance(source, bytes) else source, pre_buffer=False, **options)


def _check_lengths(source: str | bytes, metadata: Any) -> None:
    """Refuse a small file that would fill the memory: what is said a million times takes no room in it.

    Raises:
        ValueError: its texts, or lists of labels, are far longer than those of clips.
    """
    import pyarrow.compute as pc

    size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
    if metadata.num_rows > size:
        raise ValueError(f"{metadata.num_rows} rows in {size} bytes")
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema.startswith("labels.") and chunk.num_values > _MOST_LABELS * group.num_rows:
                raise ValueError(f"{chunk.num_values} labels of {group.num_rows} clips")
    # Each text once, which is no larger than what is in the file.
    with _opened(source, read_dictionary=_TEXTS) as file:
        for name in _TEXTS:
            for chunk in file.read([name], use_threads=False)[name].chunks:
                if (pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0) > _LONGEST_TEXT:
                    raise ValueError(f"a {name} of more than {_LONGEST_TEXT} letters")


def check(where: str, table: pa.Table, shards: Sequence[tuple[str, int, int]], classes: int) -> None:
    """Check what `parsed` gave: the rows of a stranger's file decide what is read of the shards.

    Args:
        where: the file, for messages.
        shards: (url, clips, bytes) of each, as the index lists them.
        classes: how many there are.

    Raises:
        AvtrainError: a row is not as it must be; names it.
    """
    clips = np.asarray([count for _, count, _ in shards], np.int64)
    empty = [name for name in _READ if name not in _NULLABLE and table[name].null_count]
    if empty or table["labels"].combine_chunks().flatten().null_count:
        raise AvtrainError(f"{where} has empty fields in {', '.join(empty or ['labels'])}: {_AGAIN}")
    for bad, what in _faults(table, [url for url, _, _ in shards], clips, [size for _, _, size in shards], classes):
        if bad.any():
            row = int(bad.argmax())
            raise AvtrainError(f"{where}, row {row + 1} ({str(table['key'][row])[:100]!r}): {what}: {_AGAIN}")


def _faults(table: pa.Table, urls: list[str], clips: NDArray[np.int64], sizes: list[int],
            classes: int) -> Iterator[tuple[NDArray[np.bool_], str]]:
    """Each kind of fault, and which rows have it; one after the other, for each takes memory."""
    import pyarrow as pa
    import pyarrow.compute as pc

    shards = np.repeat(np.arange(len(urls), dtype=np.int32), clips)
    listed = pc.index_in(table["shard"], value_set=pa.array(urls, pa.string())).fill_null(-1).to_numpy()
    yield listed < 0, "its shard is not in the index"
    yield listed != shards, "its shard is not the one that the index has there"
    yield ~pc.match_substring_regex(table["key"], r"^[A-Za-z0-9_-]+$").to_numpy(), "the key is none"
    if len(set(table["key"].to_pylist())) < len(table):  # half the memory that pyarrow's count of them takes
        numbers = table["key"].combine_chunks().dictionary_encode().indices.to_numpy()  # of distinct keys, as they come
        yield numbers != np.arange(len(table)), "the key stands in a row before"
    start_s, end_s = table["start_s"].to_numpy(), table["end_s"].to_numpy()
    yield ~(np.isfinite(start_s) & np.isfinite(end_s) & (end_s >= start_s)), "its start and end are none"
    lists = table["labels"].combine_chunks()
    labels, ends = lists.flatten().to_numpy(), lists.value_lengths().to_numpy().cumsum(dtype=np.int64)
    of_no_class = np.zeros(len(table), bool)
    of_no_class[np.searchsorted(ends, np.flatnonzero((labels < 0) | (labels >= classes)), "right")] = True
    yield of_no_class, f"a label that is none of the {classes} classes"
    end_of_row_before = np.zeros(len(table), np.int64)
    first, last = np.full(len(table), np.iinfo(np.int64).max), np.zeros(len(table), np.int64)
    limits = np.asarray(sizes, np.int64)[shards]
    for column, frames in zip(_COLUMN_OF.values(), ("frames", "mel_frames", None), strict=True):
        offsets, lengths = _integers(table, f"{column}_offset"), _integers(table, f"{column}_size")
        there = offsets >= 0
        wanted = table[frames].to_numpy() if frames else np.ones(len(table), np.int32)
        yield (wanted < 0) | (wanted > 0) & ~there, f"{frames or 'its place'} without a member {column}"
        yield ((there != (lengths >= 0)) | there & ((offsets < TAR_BLOCK) | (offsets % TAR_BLOCK != 0)
                                                    | (lengths > limits - offsets))), "a member outside its shard"
        yield lengths > _MOST_MEMBER_BYTES, "a member of more than 1 GiB"
        first = np.minimum(first, np.where(there, offsets, first))
        last = np.maximum(last, np.where(there, offsets + lengths, last))
    end_of_row_before[1:] = np.where(shards[1:] == shards[:-1], last[:-1], 0)
    yield first < end_of_row_before, "its members are not behind those of the row before"
