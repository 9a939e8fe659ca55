"""Charades: the official CSV, several labels a video, each with its times."""

from __future__ import annotations

from pathlib import Path

from avprep.datasets.source import MISSING_FILE, Listing, first_existing, number, read_csv, source_of
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
    code_and_name = [line.split(" ", 1) for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]
    index = {entry[0]: position for position, entry in enumerate(code_and_name)}
    videos = first_existing((raw / "Charades_v1_480", raw / "Charades_v1", raw / "videos", raw))
    assert videos is not None
    listing = Listing([entry[-1] for entry in code_and_name], multi_label=True)
    for row in read_csv(table, ("id", "actions")):
        actions = [action.split() for action in row["actions"].split(";") if action]
        if any(len(action) != 3 or action[0] not in index for action in actions):
            raise AvprepError(f"{table}: the actions of {row['id']} are not 'cNNN START END' of the class list")
        path = videos / f"{row['id']}.mp4"
        if not path.is_file():
            listing.skipped.append((row["id"], MISSING_FILE))
            continue
        times = tuple((number(action[1], table), number(action[2], table)) for action in actions)
        labels = tuple(index[action[0]] for action in actions)
        listing.sources.append(source_of(path, raw, labels, key=row["id"], label_times_s=times))
    return listing
