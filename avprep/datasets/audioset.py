"""AudioSet: the official segment lists with machine ids (MIDs), several labels a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from avprep.datasets.files import FilesByStem, all_places, first_existing
from avprep.datasets.source import BAD_TIMES, MISSING_FILE, UNKNOWN_CLASS, Listing, Skipped, one_of, source_of
from avprep.datasets.tables import read_csv, read_rows, time_span, whole_number
from avprep.errors import AvprepError

SPLITS = ("balanced_train", "unbalanced_train", "eval")
_ID_LENGTH = 11
# What download tools append to the id: _30000_40000 (milliseconds), _30.000, _000030_000040 ...
_TIMES = re.compile(r"[_-]([0-9.]+)([_-][0-9.]+)?")


def splits(raw: Path) -> tuple[str, ...]:
    """The splits whose segment list is there."""
    return tuple(split for split in SPLITS if _list_of(raw, split) is not None)


def find(raw: Path, split: str) -> Listing:
    """Match the split's segment list with the files below `raw`: `ID.*`, `ID_START*.*` or `YID.*`."""
    table, names = _list_of(raw, split), _annotation(raw, "class_labels_indices.csv")
    if table is None or names is None:
        lacking = f"{split}_segments.csv" if table is None else "class_labels_indices.csv"
        raise AvprepError(f"no {lacking} in {raw} or {raw / 'annotations'}: put the official file there")
    mids, classes = _class_list(names)
    index = {mid: position for position, mid in enumerate(mids)}
    listing = Listing(classes, multi_label=True)
    files: dict[str, list[tuple[str, str]]] = {}  # by id: (what stands behind it in the name, place)
    for stem, places in FilesByStem(all_places(raw, raw, listing.skipped)).items():
        name = stem[1:] if len(stem) > _ID_LENGTH and _is_id(stem[1:]) else stem
        if _is_id(name):
            files.setdefault(name[:_ID_LENGTH], []).extend((name[_ID_LENGTH:], place) for place in places)
    for row in read_rows(table, ("id", "start", "end", "mids"), listing.skipped):
        youtube_id, start, end, listed = row.values
        moment_s, wanted = time_span(start, end), [mid.strip() for mid in listed.split(",") if mid.strip()]
        if moment_s is None:
            listing.skipped.append(row.skipped(BAD_TIMES))
        elif any(mid not in index for mid in wanted):
            listing.skipped.append(row.skipped(UNKNOWN_CLASS))
        else:
            key = f"{youtube_id}_{int(moment_s[0]):06d}_{int(moment_s[1]):06d}"
            found = [source_of(place, raw, (index[mid] for mid in wanted), key=key, moment_s=moment_s)
                     for place in _of_moment(files.get(youtube_id, ()), moment_s[0])]
            if found:
                listing.sources.append(one_of(found))
            else:
                listing.skipped.append(Skipped(key, MISSING_FILE))
    return listing


def _class_list(names: Path) -> tuple[list[str], list[str]]:
    """(MIDs, names) in the order of the list's index."""
    broken: list[Skipped] = []
    rows = read_csv(names, ("index", "mid", "display_name"), broken)
    broken += [row.skipped("") for row in rows if whole_number(row.values[0]) is None]
    if broken:
        raise AvprepError(f"{names}: {broken[0].name} is not index,mid,display_name: get the official file anew")
    rows.sort(key=lambda row: int(row.values[0]))
    return [row.values[1] for row in rows], [row.values[2] for row in rows]


def _of_moment(files: Sequence[tuple[str, str]], start_s: float) -> list[str]:
    """The files of an id, without those whose name tells of another moment, as long as any is left."""
    return [place for times, place in files if _may_start_at(times, start_s)] or [place for _, place in files]


def _may_start_at(times: str, start_s: float) -> bool:
    match = _TIMES.fullmatch(times)
    try:
        return match is None or float(match[1]) in (start_s, int(start_s), 1000 * start_s)
    except ValueError:
        return True


def _is_id(stem: str) -> bool:
    return len(stem) == _ID_LENGTH or bool(_TIMES.fullmatch(stem[_ID_LENGTH:]))


def _annotation(raw: Path, name: str) -> Path | None:
    return first_existing((raw / name, raw / "annotations" / name))


def _list_of(raw: Path, split: str) -> Path | None:
    return _annotation(raw, f"{split}_segments.csv")
