"""ESC-50 and ESC-10: five folds of 5-s recordings, each fold a split."""

from __future__ import annotations

import re
from pathlib import Path

from avprep.datasets.files import FilesByStem, all_files, all_places, is_media, sub_folders
from avprep.datasets.source import (
    MISSING_FILE,
    NO_FOLD,
    UNUSABLE_ROW,
    Listing,
    Skipped,
    name_of,
    one_of,
    printable,
    source_of,
)
from avprep.datasets.tables import Row, read_csv, whole_number
from avprep.errors import AvprepError

SPLITS = ("fold1", "fold2", "fold3", "fold4", "fold5")
_FOLDS = tuple(split[-1] for split in SPLITS)
_NUMBERED_CLASS = re.compile(r"\d{3} - (.+)")


def splits(raw: Path) -> tuple[str, ...]:
    """The five official folds."""
    return SPLITS


def find_esc50(raw: Path, split: str) -> Listing:
    """`audio/*.wav` and `meta/esc50.csv`, as in the archive."""
    return _from_csv(raw, split, esc10_only=False)


def find_esc10(raw: Path, split: str) -> Listing:
    """The ESC-10 archive (`NNN - CLASS/FOLD-ID-TAKE.ogg`), or the rows of ESC-50 that are marked esc10."""
    if (raw / "meta" / "esc50.csv").exists():
        return _from_csv(raw, split, esc10_only=True)
    folders = [path for path in sub_folders(raw) if _NUMBERED_CLASS.fullmatch(path.name)]
    if not folders:
        raise AvprepError(f"no folder like '001 - Dog bark' and no meta/esc50.csv in {raw}: "
                          "unpack the ESC-10 or the ESC-50 archive there")
    listing = Listing([printable(folder.name[6:]) for folder in folders])
    for label, folder in enumerate(folders):
        for path in filter(is_media, all_files(folder, raw, listing.skipped)):
            fold = path.name.split("-")[0]
            if fold == split[-1]:
                listing.sources.append(source_of(path, raw, (label,), key=path.stem))
            elif fold not in _FOLDS:
                listing.skipped.append(Skipped(name_of(path, raw), NO_FOLD))
    return listing


def _from_csv(raw: Path, split: str, esc10_only: bool) -> Listing:
    table = raw / "meta" / "esc50.csv"
    if not table.exists():
        raise AvprepError(f"no {table}: unpack the ESC-50 archive (audio/, meta/) into {raw}")
    problems: list[Skipped] = []
    rows = [row for row in read_csv(table, ("filename", "fold", "target", "category", "esc10"), problems)
            if not esc10_only or row.values[-1].casefold() == "true"]
    problems += [row.skipped(UNUSABLE_ROW) for row in rows if not _is_usable(row)]
    recordings = [row.values for row in rows if _is_usable(row)]
    targets = {int(target): category for _, _, target, category, _ in recordings}
    index = {target: label for label, target in enumerate(sorted(targets))}
    listing = Listing([targets[target] for target in sorted(targets)], skipped=problems)
    files = FilesByStem(all_places(raw / "audio", raw, problems))
    for filename, fold, target, _, _ in recordings:
        if fold != split[-1]:
            continue
        stem, label = Path(filename).stem, index[int(target)]
        if files[stem]:
            listing.sources.append(one_of(source_of(path, raw, (label,), key=stem) for path in files[stem]))
        else:
            listing.skipped.append(Skipped(filename, MISSING_FILE))
    return listing


def _is_usable(row: Row) -> bool:
    _, fold, target, _, _ = row.values
    return whole_number(target) is not None and fold in _FOLDS
