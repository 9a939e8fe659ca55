"""Any tree of media files, split by train/ val/ test/ or not at all. Kinetics-Sounds comes in this layout too."""

from __future__ import annotations

from pathlib import Path

from avprep.datasets.source import NOT_MEDIA, Listing, all_files, is_media, source_of
from avprep.errors import AvprepError

_SPLIT_FOLDERS = ("train", "val", "test")


def splits(raw: Path) -> tuple[str, ...]:
    """The split folders that are there; a tree without any is one split, train."""
    return tuple(name for name in _SPLIT_FOLDERS if (raw / name).is_dir()) or ("train",)


def find(raw: Path, split: str) -> Listing:
    """`SPLIT/CLASS/**/*`, or `CLASS/**/*` where there are no split folders; files outside a class have no label.

    The class list is that of all splits together, so that a label means the same in each of them.
    """
    names = splits(raw)
    if split not in names:
        raise AvprepError(f"no folder {raw / split}: the splits in {raw} are {', '.join(names)}")
    folder_of = {name: raw / name for name in names} if (raw / names[0]).is_dir() else {"train": raw}
    classes = sorted({path.name for folder in folder_of.values() for path in folder.iterdir()
                      if path.is_dir() and not path.name.startswith(".")})
    index = {name: position for position, name in enumerate(classes)}
    listing = Listing(classes)
    for path in all_files(folder_of[split]):
        inside = path.relative_to(folder_of[split]).parts
        if is_media(path):
            listing.sources.append(source_of(path, raw, (index[inside[0]],) if len(inside) > 1 else ()))
        else:
            listing.skipped.append((path.relative_to(raw).as_posix(), NOT_MEDIA))
    return listing
