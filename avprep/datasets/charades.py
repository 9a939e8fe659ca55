"""Charades: the official CSV, several labels a video, each with its times."""

from __future__ import annotations

from pathlib import Path

from avprep.datasets.files import FilesByStem, all_places, first_existing
from avprep.datasets.source import (
    BAD_TIMES,
    MISSING_FILE,
    UNKNOWN_CLASS,
    UNUSABLE_ROW,
    Listing,
    Skipped,
    one_of,
    printable,
    source_of,
)
from avprep.datasets.tables import read_csv, read_lines, time_span
from avprep.errors import AvprepError

SPLITS = ("train", "test")


def splits(raw: Path) -> tuple[str, ...]:
    """Both official splits."""
    return SPLITS


def find(raw: Path, split: str) -> Listing:
    """The rows of `Charades_v1_train.csv` or `_test.csv`; files `Charades_v1/ID.mp4` or `Charades_v1_480/ID.mp4`."""
    annotation_folders = (raw, raw / "Charades", raw / "annotations")
    table = first_existing(folder / f"Charades_v1_{split}.csv" for folder in annotation_folders)
    names = first_existing(folder / "Charades_v1_classes.txt" for folder in annotation_folders)
    if table is None or names is None:
        lacking = f"Charades_v1_{split}.csv" if table is None else "Charades_v1_classes.txt"
        raise AvprepError(f"no {lacking} in {raw} or {raw / 'Charades'}: unpack the official annotations there")
    code_and_name = [line.text.split(maxsplit=1) for line in read_lines(names)]
    index = {entry[0]: position for position, entry in enumerate(code_and_name)}
    listing = Listing([printable(entry[-1]) for entry in code_and_name], multi_label=True)
    folders = [folder for name in ("Charades_v1_480", "Charades_v1", "videos") if (folder := raw / name).is_dir()]
    files = FilesByStem(place for folder in folders or [raw] for place in all_places(folder, raw, listing.skipped))
    for row in read_csv(table, ("id", "actions"), listing.skipped):
        video, actions = row.values
        times_s, problem = _times_of_labels(actions, index)
        if problem:
            listing.skipped.append(row.skipped(problem))
        elif not files[video]:
            listing.skipped.append(Skipped(video, MISSING_FILE))
        else:
            times = tuple(map(tuple, times_s.values()))
            listing.sources.append(one_of(
                source_of(path, raw, times_s, key=video, label_times_s=times) for path in files[video]))
    return listing


def _times_of_labels(actions: str, index: dict[str, int]) -> tuple[dict[int, list[tuple[float, float]]], str]:
    """'cNNN START END;...' as the times of each label, and what is wrong with it, if anything."""
    times_s: dict[int, list[tuple[float, float]]] = {}
    for action in actions.split(";"):
        if not action.strip():
            continue
        parts = action.split()
        if len(parts) != 3:
            return {}, UNUSABLE_ROW
        span = time_span(parts[1], parts[2])
        if parts[0] not in index:
            return {}, UNKNOWN_CLASS
        if span is None:
            return {}, BAD_TIMES
        times_s.setdefault(index[parts[0]], []).append(span)
    return times_s, ""
