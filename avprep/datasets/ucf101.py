"""UCF101: class folders and the three official split files."""

from __future__ import annotations

from pathlib import Path

from avprep.datasets.source import MISSING_FILE, Listing, first_existing, source_of
from avprep.errors import AvprepError

SPLITS = ("train1", "test1", "train2", "test2", "train3", "test3")


def splits(raw: Path) -> tuple[str, ...]:
    """All six: three official train/test pairs."""
    return SPLITS


def find(raw: Path, split: str) -> Listing:
    """The videos of `trainlist01.txt` and so on; files as in the archive, `CLASS/v_CLASS_gNN_cNN.avi`."""
    lists = first_existing((raw / "ucfTrainTestlist", raw / "annotations", raw / "splits", raw))
    name = f"{split[:-1]}list0{split[-1]}.txt"
    if lists is None or not (lists / name).exists() or not (lists / "classInd.txt").exists():
        raise AvprepError(f"no {name} and classInd.txt in {raw / 'ucfTrainTestlist'}: "
                          "put the official split files there")
    classes = [line.split()[-1] for line in (lists / "classInd.txt").read_text().splitlines() if line.strip()]
    index = {class_name: position for position, class_name in enumerate(classes)}
    videos = first_existing((raw / "UCF-101", raw / "videos", raw))
    assert videos is not None
    listing = Listing(classes)
    for line in (lists / name).read_text().splitlines():
        if not line.strip():
            continue
        entry = line.split()[0]
        label = index.get(entry.split("/")[0])
        path = videos / entry
        if label is None:
            raise AvprepError(f"{lists / name}: the class of {entry!r} is not in classInd.txt")
        if path.is_file():
            listing.sources.append(source_of(path, raw, (label,), key=path.stem))
        else:
            listing.skipped.append((entry, MISSING_FILE))
    return listing
