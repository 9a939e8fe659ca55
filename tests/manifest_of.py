"""The manifest of format version 2, made from finished shards with tarfile and pyarrow alone, never by our own code.

It stands in for what `avprep build` writes, and says what that must be equal to.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_STRINGS, _FLOATS = pa.list_(pa.string()), pa.list_(pa.float64())
FIELDS = {"key": pa.string(), "source": pa.string(), "shard": pa.string(), "start_s": pa.float64(),
          "end_s": pa.float64(), "labels": pa.list_(pa.int32()), "label_times_s": pa.list_(_FLOATS),
          "frames": pa.int32(), "width": pa.int32(), "height": pa.int32(), "sound_s": pa.float64(),
          "mel_frames": pa.int32(), "missing": _STRINGS, "marks": _STRINGS}
ENDINGS = {"mp4": "mp4", "logmel.npy": "logmel", "json": "json"}
SCHEMA = pa.schema([*FIELDS.items(), *((f"{member}_{what}", pa.int64()) for member in ENDINGS.values()
                                       for what in ("offset", "size"))])


def table_of(folder: Path) -> pa.Table:
    """One row a clip of the shards that the folder's index lists, in their order and that of the tars."""
    rows: dict[str, dict[str, object]] = {}
    for entry in json.loads((folder / "index.json").read_text(encoding="utf-8"))["shardlist"]:
        with tarfile.open(folder / entry["url"]) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                row = rows.setdefault(key, {"shard": entry["url"]})
                row |= {f"{ENDINGS[ending]}_offset": member.offset_data, f"{ENDINGS[ending]}_size": member.size}
                if ending == "json":
                    info = json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]
                    row |= {name: info.get(name) for name in FIELDS if name != "shard"}
    return pa.Table.from_pylist(list(rows.values()), schema=SCHEMA)


def add_manifests(root: Path) -> None:
    """Make what lies below the folder format version 2, where it is not: write clips.parquet, change index.json."""
    for path in sorted(root.rglob("index.json")):
        if not (path.parent / "clips.parquet").exists():
            pq.write_table(table_of(path.parent), path.parent / "clips.parquet")
            index = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps({**index, "format_version": 2}, indent=1) + "\n", encoding="utf-8")
