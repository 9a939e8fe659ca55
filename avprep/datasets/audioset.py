"""AudioSet: the official segment lists with machine ids (MIDs), several labels a file."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from avprep.datasets.source import (
    LISTED_TWICE,
    MISSING_FILE,
    Listing,
    all_files,
    first_existing,
    is_media,
    number,
    read_csv,
    source_of,
)
from avprep.errors import AvprepError

SPLITS = ("balanced_train", "unbalanced_train", "eval")
_ID_LENGTH = 11
# What download tools append to the id: _30000_40000 (milliseconds), _30.000, _000030_000040 ...
_TIMES = re.compile(r"[_-][0-9.]+([_-][0-9.]+)?")


def splits(raw: Path) -> tuple[str, ...]:
    """The splits whose segment list is there."""
    return tuple(split for split in SPLITS if _list_of(raw, split) is not None)


def find(raw: Path, split: str) -> Listing:
    """Match the split's segment list with the files below `raw`: `ID.*`, `ID_START*.*` or `YID.*`."""
    table, names = _list_of(raw, split), _annotation(raw, "class_labels_indices.csv")
    if table is None or names is None:
        lacking = f"{split}_segments.csv" if table is None else "class_labels_indices.csv"
        raise AvprepError(f"no {lacking} in {raw} or {raw / 'annotations'}: put the official file there")
    class_rows = sorted(read_csv(names, ("index", "mid", "display_name")), key=lambda row: int(row["index"]))
    index = {row["mid"]: position for position, row in enumerate(class_rows)}
    files: dict[str, Path] = {}
    for path in filter(is_media, all_files(raw)):
        stem = path.stem[1:] if len(path.stem) > _ID_LENGTH and _is_id(path.stem[1:]) else path.stem
        if _is_id(stem):
            files.setdefault(stem[:_ID_LENGTH], path)
    listing = Listing([row["display_name"] for row in class_rows], multi_label=True)
    seen: set[str] = set()
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.reader((line for line in file if not line.startswith("#")), skipinitialspace=True):
            if len(row) < 4:
                continue
            youtube_id, start_s, end_s = row[0], number(row[1], table), number(row[2], table)
            labels = tuple(index[mid] for mid in row[3].split(",") if mid in index)
            key = f"{youtube_id}_{int(start_s):06d}_{int(end_s):06d}"
            if youtube_id not in files:
                listing.skipped.append((key, MISSING_FILE))
            elif key in seen:
                listing.skipped.append((key, LISTED_TWICE))
            else:
                listing.sources.append(source_of(files[youtube_id], raw, labels, key=key, moment_s=(start_s, end_s)))
            seen.add(key)
    return listing


def _is_id(stem: str) -> bool:
    return len(stem) == _ID_LENGTH or bool(_TIMES.fullmatch(stem[_ID_LENGTH:]))


def _annotation(raw: Path, name: str) -> Path | None:
    return first_existing((raw / name, raw / "annotations" / name))


def _list_of(raw: Path, split: str) -> Path | None:
    return _annotation(raw, f"{split}_segments.csv")
