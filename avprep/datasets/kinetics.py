"""Kinetics-400/600/700: the official CSV and files by YouTube id, trimmed or whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from avprep.datasets.files import FilesByStem, all_places
from avprep.datasets.source import BAD_TIMES, MISSING_FILE, Listing, Skipped, one_of, source_of
from avprep.datasets.tables import Row, stream_csv, time_span
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
    label_of: dict[str, tuple[int, ...]] = {"": ()}  # by name, in the order of the rows for now
    for row, moment_s in _rows(raw, split, listing.skipped):
        youtube_id = row.values["youtube_id"]
        stem = f"{youtube_id}_{int(moment_s[0]):06d}_{int(moment_s[1]):06d}"
        label = label_of.setdefault(_label(row), (len(label_of) - 1,))
        trimmed, whole = files[stem], files[youtube_id]
        if trimmed or whole:
            listing.sources.append(one_of([
                *(source_of(place, raw, label, key=stem) for place in trimmed),
                *(source_of(place, raw, label, key=stem, moment_s=moment_s) for place in whole)]))
        else:
            listing.skipped.append(Skipped(stem, MISSING_FILE))
    listing.classes = sorted(labels.union(label_of) - {""})
    index = {name: (position,) for position, name in enumerate(listing.classes)} | {"": ()}
    final = {label: index[name] for name, label in label_of.items()}
    for number, source in enumerate(listing.sources):
        listing.sources[number] = source._replace(labels=final[source.labels], others=source.others and tuple(
            other._replace(labels=final[other.labels]) for other in source.others))
    return listing


def _label(row: Row) -> str:
    return row.values.get("label", "")


def _labels(raw: Path, split: str) -> set[str]:
    try:
        return {_label(row) for row, _ in _rows(raw, split, [])}
    except AvprepError:  # no table of ours, which is said when this split is built
        return set()


def _rows(raw: Path, split: str, problems: list[Skipped]) -> Iterator[tuple[Row, tuple[float, float]]]:
    """The usable rows of a split's CSV, each with its moment."""
    table = _csv(raw, split)
    assert table is not None
    for row in stream_csv(table, _COLUMNS, problems, more=("label",)):
        moment_s = time_span(row.values["time_start"], row.values["time_end"])
        if moment_s is None:
            problems.append(row.skipped(BAD_TIMES))
        else:
            yield row, moment_s


def _csv(raw: Path, split: str) -> Path | None:
    """The split's table: train.csv, or for example kinetics700_train.csv or kinetics-700_val.csv, in any case."""
    tables = [folder / name for folder in (raw, raw / "annotations") if folder.is_dir()
              for name in sorted(os.listdir(folder)) if name.lower().endswith(".csv")]
    names = _OTHER_NAMES[split]
    exact = [path for path in tables for name in names if path.stem.lower() == name]
    longer = [path for path in tables for name in names if path.stem.lower().endswith((f"_{name}", f"-{name}"))]
    return next(iter(exact + longer), None)
