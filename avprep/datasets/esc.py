"""ESC-50 and ESC-10: five folds of 5-s recordings, each fold a split."""

from __future__ import annotations

import re
from pathlib import Path

from avprep.datasets.source import MISSING_FILE, Listing, all_files, is_media, number, read_csv, source_of
from avprep.errors import AvprepError

SPLITS = ("fold1", "fold2", "fold3", "fold4", "fold5")
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
    folders = sorted(path for path in raw.iterdir() if path.is_dir() and _NUMBERED_CLASS.fullmatch(path.name))
    if not folders:
        raise AvprepError(f"no folder like '001 - Dog bark' and no meta/esc50.csv in {raw}: "
                          "unpack the ESC-10 or the ESC-50 archive there")
    listing = Listing([folder.name[6:] for folder in folders])
    for label, folder in enumerate(folders):
        listing.sources += [source_of(path, raw, (label,), key=path.stem) for path in all_files(folder)
                            if is_media(path) and path.name.split("-")[0] == split[-1]]
    return listing


def _from_csv(raw: Path, split: str, esc10_only: bool) -> Listing:
    table = raw / "meta" / "esc50.csv"
    if not table.exists():
        raise AvprepError(f"no {table}: unpack the ESC-50 archive (audio/, meta/) into {raw}")
    rows = read_csv(table, ("filename", "fold", "target", "category", "esc10"))
    if esc10_only:
        rows = [row for row in rows if row["esc10"] == "True"]

    def target_of(row: dict[str, str]) -> int:
        return int(number(row["target"], table))

    targets = {target_of(row): row["category"] for row in rows}
    index = {target: label for label, target in enumerate(sorted(targets))}
    listing = Listing([targets[target] for target in sorted(targets)])
    for row in rows:
        if row["fold"] != split[-1]:
            continue
        path = raw / "audio" / row["filename"]
        if path.is_file():
            listing.sources.append(source_of(path, raw, (index[target_of(row)],), key=path.stem))
        else:
            listing.skipped.append((row["filename"], MISSING_FILE))
    return listing
