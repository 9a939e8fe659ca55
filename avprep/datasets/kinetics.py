"""Kinetics-400/600/700: the official CSV and files by YouTube id, trimmed or whole."""

from __future__ import annotations

import os
from pathlib import Path

from avprep.datasets.files import all_files, by_stem
from avprep.datasets.source import BAD_TIMES, MISSING_FILE, Listing, Skipped, one_of, source_of
from avprep.datasets.tables import Row, read_csv, time_span
from avprep.errors import AvprepError

SPLITS = ("train", "val", "test")
_OTHER_NAMES = {"train": ("train",), "val": ("val", "validate", "validation"), "test": ("test",)}
_COLUMNS = ("youtube_id", "time_start", "time_end")


def splits(raw: Path) -> tuple[str, ...]:
    """The splits whose CSV is there."""
    return tuple(split for split in SPLITS if _csv(raw, split) is not None)


def find(raw: Path, split: str) -> Listing:
    """Match the rows of the split's CSV with the files below `raw`.

    A file `ID_SSSSSS_EEEEEE.*` (flat or in any sub-folder) is the trimmed clip of a row; a file `ID.*` is the whole
    video, out of which a clip is cut around the annotated moment. The class list is that of all splits together, so
    that a label means the same in each of them.
    """
    if _csv(raw, split) is None:
        raise AvprepError(f"no CSV of the split {split!r} in {raw} or {raw / 'annotations'}: put the official "
                          f"{split}.csv (label,youtube_id,time_start,time_end,split) there, or use --dataset folder")
    problems: list[Skipped] = []
    rows = _rows(raw, split, problems)
    others = (_labels(raw, other) for other in splits(raw) if other != split)
    classes = sorted({_label(row) for row, _ in rows}.union(*others) - {""})
    index = {name: position for position, name in enumerate(classes)}
    files = by_stem(all_files(raw, raw, problems))
    listing = Listing(classes, skipped=problems)
    for row, moment_s in rows:
        youtube_id = row.values["youtube_id"]
        stem = f"{youtube_id}_{int(moment_s[0]):06d}_{int(moment_s[1]):06d}"
        labels = (index[_label(row)],) if _label(row) else ()
        found = [source_of(path, raw, labels, key=stem) for path in files.get(stem, ())]
        found += [source_of(path, raw, labels, key=stem, moment_s=moment_s) for path in files.get(youtube_id, ())]
        if found:
            listing.sources.append(one_of(found))
        else:
            listing.skipped.append(Skipped(stem, MISSING_FILE))
    return listing


def _label(row: Row) -> str:
    return row.values.get("label", "")


def _labels(raw: Path, split: str) -> set[str]:
    try:
        return {_label(row) for row, _ in _rows(raw, split, [])}
    except AvprepError:  # no table of ours, which is said when this split is built
        return set()


def _rows(raw: Path, split: str, problems: list[Skipped]) -> list[tuple[Row, tuple[float, float]]]:
    """The usable rows of a split's CSV, each with its moment."""
    table = _csv(raw, split)
    assert table is not None
    usable = []
    for row in read_csv(table, _COLUMNS, problems, more=("label",)):
        moment_s = time_span(row.values["time_start"], row.values["time_end"])
        if moment_s is None:
            problems.append(row.skipped(BAD_TIMES))
        else:
            usable.append((row, moment_s))
    return usable


def _csv(raw: Path, split: str) -> Path | None:
    """The split's table: train.csv, or for example kinetics700_train.csv or kinetics-700_val.csv, in any case."""
    tables = [folder / name for folder in (raw, raw / "annotations") if folder.is_dir()
              for name in sorted(os.listdir(folder)) if name.lower().endswith(".csv")]
    names = _OTHER_NAMES[split]
    exact = [path for path in tables for name in names if path.stem.lower() == name]
    longer = [path for path in tables for name in names if path.stem.lower().endswith((f"_{name}", f"-{name}"))]
    return next(iter(exact + longer), None)
