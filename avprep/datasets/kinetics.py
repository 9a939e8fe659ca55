"""Kinetics-400/600/700: the official CSV and files by YouTube id, trimmed or whole."""

from __future__ import annotations

from pathlib import Path

from avprep.datasets.source import (
    LISTED_TWICE,
    MISSING_FILE,
    VIDEO_SUFFIXES,
    Listing,
    all_files,
    first_existing,
    number,
    read_csv,
    source_of,
)
from avprep.errors import AvprepError

SPLITS = ("train", "val", "test")
_OTHER_NAMES = {"train": ("train",), "val": ("val", "validate", "validation"), "test": ("test",)}


def splits(raw: Path) -> tuple[str, ...]:
    """The splits whose CSV is there."""
    return tuple(split for split in SPLITS if _csv(raw, split) is not None)


def find(raw: Path, split: str) -> Listing:
    """Match the rows of the split's CSV with the files below `raw`.

    A file `ID_SSSSSS_EEEEEE.*` (flat or in any sub-folder) is the trimmed clip of a row; a file `ID.*` is the whole
    video, out of which a clip is cut around the annotated moment.
    """
    table = _csv(raw, split)
    if table is None:
        raise AvprepError(f"no CSV of the split {split!r} in {raw} or {raw / 'annotations'}: put the official "
                          f"{split}.csv (label,youtube_id,time_start,time_end,split) there, or use --dataset folder")
    rows = read_csv(table, ("youtube_id", "time_start", "time_end"))
    classes = sorted({row["label"] for row in rows if row.get("label")})
    index = {name: position for position, name in enumerate(classes)}
    by_stem = {path.stem: path for path in all_files(raw) if path.suffix.lower() in VIDEO_SUFFIXES}
    listing = Listing(classes)
    seen: set[str] = set()
    for row in rows:
        start_s, end_s = number(row["time_start"], table), number(row["time_end"], table)
        stem = f"{row['youtube_id']}_{int(start_s):06d}_{int(end_s):06d}"
        labels = (index[row["label"]],) if row.get("label") else ()
        if stem in seen:
            listing.skipped.append((stem, LISTED_TWICE))
        elif stem in by_stem:
            listing.sources.append(source_of(by_stem[stem], raw, labels, key=stem))
        elif row["youtube_id"] in by_stem:
            listing.sources.append(source_of(by_stem[row["youtube_id"]], raw, labels, key=stem,
                                             moment_s=(start_s, end_s)))
        else:
            listing.skipped.append((stem, MISSING_FILE))
        seen.add(stem)
    return listing


def _csv(raw: Path, split: str) -> Path | None:
    names = _OTHER_NAMES[split]
    exact = first_existing(folder / f"{name}.csv" for folder in (raw, raw / "annotations") for name in names)
    if exact is not None:
        return exact
    # For example kinetics700_train.csv, kinetics-700_val.csv.
    return first_existing(path for folder in (raw, raw / "annotations") for name in names
                          for path in sorted(folder.glob(f"*[_-]{name}.csv")))
