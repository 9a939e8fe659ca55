"""UCF101: class folders and the three official split files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from avprep.datasets.files import FilesByStem, all_places, first_existing
from avprep.datasets.source import MISSING_FILE, UNKNOWN_CLASS, Listing, Skipped, one_of, printable, source_of
from avprep.datasets.tables import read_lines
from avprep.errors import AvprepError

SPLITS = ("train1", "test1", "train2", "test2", "train3", "test3")


def splits(raw: Path) -> tuple[str, ...]:
    """All six: three official train/test pairs."""
    return SPLITS


def find(raw: Path, split: str) -> Listing:
    """The videos of `trainlist01.txt` and so on; files as in the archive, `CLASS/v_CLASS_gNN_cNN.avi`.

    Copies with another ending are found too, and classes that are spelt in another case (HandStandPushups).
    """
    lists = first_existing((raw / "ucfTrainTestlist", raw / "annotations", raw / "splits", raw))
    name = f"{split[:-1]}list0{split[-1]}.txt"
    if lists is None or not (lists / name).exists() or not (lists / "classInd.txt").exists():
        raise AvprepError(f"no {name} and classInd.txt in {raw / 'ucfTrainTestlist'}: "
                          "put the official split files there")
    classes = _class_list(lists / "classInd.txt")
    videos = first_existing((raw / "UCF-101", raw / "videos", raw))
    assert videos is not None
    listing = Listing([printable(name) for name in classes])
    files: dict[str, list[PurePosixPath]] = {}  # by CLASS/STEM
    for stem, places in FilesByStem(all_places(videos, raw, listing.skipped)).items():
        for path in map(PurePosixPath, places):
            files.setdefault(f"{path.parent.name}/{stem}", []).append(path)
    any_case = _by_any_case(files)
    for line in read_lines(lists / name):
        entry = PurePosixPath(re.sub(r"\s+\d+$", "", line.text).replace("\\", "/"))
        label = _spelt_like(entry.parent.name, classes)
        alike = any_case.get(_place(entry).casefold(), [])
        place = _place(entry) if _place(entry) in files else alike[0] if len(alike) == 1 else None
        if label is None:
            listing.skipped.append(line.skipped(UNKNOWN_CLASS))
        elif place is None:
            listing.skipped.append(Skipped(printable(str(entry)), MISSING_FILE))
        else:
            found = sorted(files[place], key=lambda path: path.suffix != entry.suffix)
            listing.sources.append(one_of(source_of(str(path), raw, (classes.index(label),), key=entry.stem)
                                          for path in found))
    return listing


def _place(entry: PurePosixPath) -> str:
    return f"{entry.parent.name}/{entry.stem}"


def _class_list(path: Path) -> list[str]:
    """The names of classInd.txt, whose lines are 'NUMBER CLASS'."""
    classes = [line.text.split()[-1] for line in read_lines(path)]
    cut = [line.place for line in read_lines(path) if line.text.isdecimal()]
    if cut:
        raise AvprepError(f"{path}: {cut[0]} has no class: get the official file anew")
    return classes


def _by_any_case(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.casefold(), []).append(name)
    return found


def _spelt_like(name: str, classes: list[str]) -> str | None:
    """The class of this name, or the only one that differs from it in case alone."""
    if name in classes:
        return name
    same = _by_any_case(classes).get(name.casefold(), [])
    return same[0] if len(same) == 1 else None
