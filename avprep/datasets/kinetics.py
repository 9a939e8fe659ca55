"""Kinetics-400/600/700: the official CSV and files by YouTube id, trimmed or whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from avprep.datasets.files import FilesByStem, all_places
from avprep.datasets.source import BAD_TIMES, MISSING_FILE, Listing, Skipped, Source, one_of, safe_key
from avprep.datasets.tables import stream_csv, time_span
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
    labels = {label for other in splits(raw) if other != split for label in _labels(raw, other)}
    listing = Listing([])
    files = FilesByStem(all_places(raw, raw, listing.skipped))
    rows = list(_rows(raw, split, listing.skipped))
    listing.classes = sorted(labels.union([row[-1] for row in rows]) - {""})
    labels_of = {name: (position,) for position, name in enumerate(listing.classes)} | {"": ()}
    rows.reverse()
    while rows:  # each goes as it is matched: there may be millions
        youtube_id, moment_s, label = rows.pop()
        stem = youtube_id + _suffix(moment_s)
        key, its_labels = safe_key(stem), labels_of[label]
        found = [Source(key, raw, before, stem, behind, its_labels) for before, behind in files.around(stem)]
        found += [Source(key, raw, f"{before}{youtube_id}{behind}", stem, None, its_labels, moment_s)
                  for before, behind in files.around(youtube_id)]
        if found:
            listing.sources.append(one_of(found) if len(found) > 1 else found[0])
        else:
            listing.skipped.append(Skipped(stem, MISSING_FILE))
    return listing


@lru_cache(maxsize=1 << 16)
def _suffix(moment_s: tuple[float, float]) -> str:
    """What stands behind the id in the name of a trimmed clip."""
    return f"_{int(moment_s[0]):06d}_{int(moment_s[1]):06d}"


def _labels(raw: Path, split: str) -> set[str]:
    try:
        return {row[-1] for row in _rows(raw, split, [])}
    except AvprepError:  # no table of ours, which is said when this split is built
        return set()


def _rows(raw: Path, split: str, problems: list[Skipped]) -> Iterator[tuple[str, tuple[float, float], str]]:
    """(YouTube id, moment, label) of the usable rows of a split's CSV."""
    table = _csv(raw, split)
    assert table is not None
    for row in stream_csv(table, _COLUMNS, problems, more=("label",)):
        youtube_id, start, end, label = row.values
        moment_s = time_span(start, end)
        if moment_s is None:
            problems.append(row.skipped(BAD_TIMES))
        else:
            yield youtube_id, moment_s, label


def _csv(raw: Path, split: str) -> Path | None:
    """The split's table: train.csv, or for example kinetics700_train.csv or kinetics-700_val.csv, in any case."""
    tables = [folder / name for folder in (raw, raw / "annotations") if folder.is_dir()
              for name in sorted(os.listdir(folder)) if name.lower().endswith(".csv")]
    names = _OTHER_NAMES[split]
    exact = [path for path in tables for name in names if path.stem.lower() == name]
    longer = [path for path in tables for name in names if path.stem.lower().endswith((f"_{name}", f"-{name}"))]
    return next(iter(exact + longer), None)
