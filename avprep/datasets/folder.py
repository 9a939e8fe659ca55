"""Any tree of media files, split by train/ val/ test/ or not at all. Kinetics-Sounds comes in this layout too."""

from __future__ import annotations

from pathlib import Path

from avprep.datasets.files import all_files, is_media, sub_folders
from avprep.datasets.source import BESIDE_SPLITS, NOT_MEDIA, Listing, Skipped, name_of, printable, source_of
from avprep.errors import AvprepError

SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validate", "validation", "dev"),
               "test": ("test", "testing", "eval", "evaluation")}
_SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}


def splits(raw: Path) -> tuple[str, ...]:
    """The splits whose folders are there; a tree without any is one split, train."""
    return tuple(_split_folders(raw)) or ("train",)


def find(raw: Path, split: str) -> Listing:
    """`SPLIT/CLASS/**/*`, or `CLASS/**/*` where there are no split folders; files outside a class have no label.

    The class list is that of all splits together, so that a label means the same in each of them; a class is a folder
    that holds media.
    """
    folders_of = _split_folders(raw)
    names = tuple(folders_of) or ("train",)
    if split not in names:
        raise AvprepError(f"no folder {raw / split}: the splits in {raw} are {', '.join(names)}")
    roots = [folder for folders in folders_of.values() for folder in folders] or [raw]
    classes = sorted({printable(path.name) for root in roots for path in sub_folders(root) if _holds_media(path, raw)})
    index = {name: position for position, name in enumerate(classes)}
    listing = Listing(classes)
    for root in folders_of.get(split, [raw]):
        for path in all_files(root, raw, listing.skipped):
            inside = path.relative_to(root).parts
            if is_media(path):
                labels = (index[printable(inside[0])],) if len(inside) > 1 else ()
                listing.sources.append(source_of(path, raw, labels))
            else:
                listing.skipped.append(Skipped(name_of(path, raw), NOT_MEDIA))
    if folders_of:
        listing.skipped += [Skipped(name_of(path, raw), BESIDE_SPLITS) for path in _beside(raw, roots)]
    return listing


def _split_folders(raw: Path) -> dict[str, list[Path]]:
    """The folders of each split, in the order train, val, test; none if the folders in `raw` are classes.

    train/, val/ and test/ are splits in any case of letters. Other names for them (validation/, testing/) are, if they
    stand beside one of those or if there are no other folders of media. But one such folder alone, beside others, is a
    class (bus/, plane/, train/) if media lie in it and not in folders below it.
    """
    named: dict[str, list[Path]] = {}
    for path in sub_folders(raw):
        if path.name.casefold() in _SPLIT_OF:
            named.setdefault(_SPLIT_OF[path.name.casefold()], []).append(path)
    found = [path for paths in named.values() for path in paths]
    if found and any(path.is_dir() for path in _beside(raw, found)):
        only_other_names = not any(path.name.casefold() in SPLIT_NAMES for path in found)
        if only_other_names or (len(found) == 1 and _holds_media_itself(found[0], raw)):
            return {}
    return {split: named[split] for split in SPLIT_NAMES if split in named}


def _beside(raw: Path, taken: list[Path]) -> list[Path]:
    """What holds media in `raw` itself, beside the folders that are taken."""
    folders = sub_folders(raw)
    files = (path for path in sorted(raw.iterdir()) if is_media(path) and not path.name.startswith("."))
    return [*(path for path in folders if path not in taken and _holds_media(path, raw)),
            *(path for path in files if path not in folders)]


def _holds_media(folder: Path, raw: Path) -> bool:
    return any(map(is_media, all_files(folder, raw, [])))


def _holds_media_itself(folder: Path, raw: Path) -> bool:
    return _holds_media(folder, raw) and not any(_holds_media(path, raw) for path in sub_folders(folder))
