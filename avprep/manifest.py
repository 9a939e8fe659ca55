"""The two tables beside an index, a row a clip and a row a source: their columns, written and read."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from avprep.errors import AvprepError

CLIPS, SOURCES = "clips.parquet", "sources.parquet"
# The members of a sample, and how the columns of their places begin: mp4_offset, mp4_size, ...
MEMBERS = {"mp4": "mp4", "logmel.npy": "logmel", "json": "json"}

CLIPS_SCHEMA = pa.schema([
    ("key", pa.string()), ("source", pa.string()), ("shard", pa.string()),
    ("start_s", pa.float64()), ("end_s", pa.float64()),
    ("labels", pa.list_(pa.int32())), ("label_times_s", pa.list_(pa.list_(pa.float64()))),
    ("frames", pa.int32()), ("width", pa.int32()), ("height", pa.int32()),
    ("sound_s", pa.float64()), ("mel_frames", pa.int32()),
    ("missing", pa.list_(pa.string())), ("marks", pa.list_(pa.string())),
    *((f"{column}_{what}", pa.int64()) for column in MEMBERS.values() for what in ("offset", "size"))])
SOURCES_SCHEMA = pa.schema([
    ("name", pa.string()), ("key", pa.string()), ("status", pa.string()), ("reason", pa.string()),
    ("detail", pa.string()), ("clips", pa.int32()), ("promised_s", pa.float64()), ("came_s", pa.float64())])

_ROWS_AT_A_TIME = 10_000
# Fixed, so that the same rows are the same bytes.
_SETTINGS = {"compression": "zstd", "row_group_size": 1 << 16, "version": "2.6", "data_page_version": "1.0"}


def clip_row(info: dict[str, Any], shard: str, places: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """The row of a clip: of its json what the columns name, and (offset, size) in the tar of each member by ending."""
    row = {name: info.get(name) for name in CLIPS_SCHEMA.names} | {"shard": shard}
    for ending, column in MEMBERS.items():
        row[f"{column}_offset"], row[f"{column}_size"] = places.get(ending, (None, None))
    return row


def places_of(row: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(offset, size) in the tar of each member that a clip has, by ending; in the order of their offsets."""
    there = {ending: (row[f"{column}_offset"], row[f"{column}_size"]) for ending, column in MEMBERS.items()
             if row[f"{column}_offset"] is not None}
    return dict(sorted(there.items(), key=lambda member: member[1]))


def table_of(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as columns: a fraction of the memory."""
    rest = iter(rows)
    parts = iter(lambda: list(islice(rest, _ROWS_AT_A_TIME)), [])
    return pa.concat_tables([schema.empty_table(), *(pa.Table.from_pylist(part, schema=schema) for part in parts)])


def parquet_of(table: pa.Table) -> bytes:
    """The table as a Parquet file: the same bytes however it was put together."""
    file = io.BytesIO()
    pq.write_table(table.combine_chunks(), file, **_SETTINGS)
    return file.getvalue()


def entry_of(url: str, content: bytes, rows: int) -> dict[str, Any]:
    """What the index says of a table: url (relative to the index), nrows, filesize in bytes, sha256."""
    return {"url": url, "nrows": rows, "filesize": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read_clips(folder: Path, index: dict[str, Any], columns: list[str] | None = None) -> pa.Table:
    """The rows of the clips of an index, all columns or some.

    Raises:
        AvprepError: the table is not there, or not that of the index.
    """
    return _read(folder, index, CLIPS, CLIPS_SCHEMA, columns)


def clip_lengths_s(folder: Path, index: dict[str, Any]) -> tuple[float, float, float]:
    """The shortest, median and longest clip of an index, in seconds; zeros if it has none."""
    clips = read_clips(folder, index, ["start_s", "end_s"])
    lengths_s = sorted(pc.subtract(clips["end_s"], clips["start_s"]).to_pylist()) or [0.0]
    return lengths_s[0], lengths_s[len(lengths_s) // 2], lengths_s[-1]


def read_sources(folder: Path, index: dict[str, Any]) -> pa.Table:
    """The rows of the sources of an index.

    Raises:
        AvprepError: the table is not there, or not that of the index.
    """
    return _read(folder, index, SOURCES, SOURCES_SCHEMA, None)


def _read(folder: Path, index: dict[str, Any], name: str, schema: pa.Schema, columns: list[str] | None) -> pa.Table:
    path = folder / name
    try:
        content = path.read_bytes()
        [entry] = [entry for entry in index["manifest"] if entry["url"] == name]
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise AvprepError(f"{path} is not the one that the index describes: delete the index and run "
                              "`avprep build` again")
        # By this thread alone: a thread of pyarrow's pool that still runs when the command ends aborts the process.
        with pq.ParquetFile(pa.BufferReader(content), pre_buffer=False) as file:
            table = file.read(columns=columns, use_threads=False)
    except (OSError, KeyError, ValueError) as error:  # pyarrow's errors are such, too
        raise AvprepError(f"{path} can't be read: {error}") from error
    wanted = schema if columns is None else pa.schema([schema.field(column) for column in columns])
    if table.schema != wanted:
        raise AvprepError(f"{path} has not the columns of shards/README.md")
    return table
