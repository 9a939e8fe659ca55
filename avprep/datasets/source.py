"""What an adapter hands on: sources with labels, each under a key of its own, and what it could not use."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

_LONGEST_KEY = 80

MISSING_FILE = "listed, but no such file"
LISTED_TWICE = "listed twice"
NOT_MEDIA = "not named like a media file"
OTHER_FILE = "another file of its id was taken"
UNUSABLE_ROW = "not a usable row"
BAD_TIMES = "a row without usable times"
UNKNOWN_CLASS = "a class that is not in the class list"
NO_FOLD = "its name tells no fold"
BESIDE_SPLITS = "beside the split folders"
UNREADABLE_FOLDER = "a folder that can't be read"
CIRCLE = "a link to a folder that it lies in"
EMPTY_FOLDER = "an empty folder, named like a media file"


@dataclass(frozen=True)
class Source:
    """One file with its labels, as a dataset lists it.

    Attributes:
        key: unique in the split, of `[A-Za-z0-9_-]` only: safe as a member name in any tar.
        path: where the file is.
        name: the path relative to the raw folder, printable: what reports and samples call it.
        entry: what the dataset calls it, before that was made safe as a key.
        labels: indices into the class list, none twice.
        moment_s: start and end of the annotated moment in the file, where the file may be longer than it.
        label_times_s: of each label, in the order of `labels`, the (start, end) in the file of each time it is given;
            None: all the time.
        others: further files of the same id, in order of preference; whoever opens them takes the best.
    """

    key: str
    path: Path
    name: str
    entry: str
    labels: tuple[int, ...] = ()
    moment_s: tuple[float, float] | None = None
    label_times_s: tuple[tuple[tuple[float, float], ...], ...] | None = None
    others: tuple[Source, ...] = ()

    @property
    def candidates(self) -> tuple[Source, ...]:
        """This file and the others."""
        return (self, *self.others)

    @property
    def is_replacement(self) -> bool:
        """Whether it lies in a folder of replacements for broken files, such as Kinetics-400's."""
        return any("replacement" in part.casefold() for part in PurePosixPath(self.name).parts[:-1])


@dataclass(frozen=True)
class Skipped:
    """An entry that can't be used: a row of sources.parquet. `detail`: the particulars, if there are any."""

    name: str
    reason: str
    detail: str = ""


@dataclass
class Listing:
    """A split as its annotation lists it.

    Attributes:
        classes: names; a label is an index into them.
        sources: the files that are there.
        skipped: what is listed or there but can't be used.
        multi_label: whether a source may have several labels.
    """

    classes: list[str]
    sources: list[Source] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    multi_label: bool = False


def printable(name: str) -> str:
    r"""The name as it can be printed and stored: bytes that are not UTF-8 become \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def name_of(path: Path, raw: Path) -> str:
    """What reports call a file: its printable path below the raw folder."""
    return printable(path.relative_to(raw).as_posix())


def safe_key(name: str) -> str:
    """A member name for any tar, without a dot (readers split at the first one)."""
    key = re.sub(r"[^A-Za-z0-9_-]", "_", name).lstrip("-")
    return key if key == name and len(key) <= _LONGEST_KEY else _marked(key, os.fsencode(name))


def _marked(key: str, distinction: bytes) -> str:
    return f"{key[:_LONGEST_KEY - 9]}_{hashlib.sha1(distinction).hexdigest()[:8]}"


def source_of(path: Path, raw: Path, labels: Iterable[int] = (), *, key: str | None = None,
              moment_s: tuple[float, float] | None = None,
              label_times_s: tuple[tuple[tuple[float, float], ...], ...] | None = None) -> Source:
    """A source named by its file's place under the raw folder; `key` where the dataset has a shorter name for it."""
    place = path.relative_to(raw).as_posix()
    entry = key or place[: len(place) - len(path.suffix)]
    return Source(safe_key(entry), path, printable(place), printable(entry), tuple(dict.fromkeys(labels)), moment_s,
                  label_times_s)


def one_of(candidates: Iterable[Source]) -> Source:
    """One source of several files for the same id, in order of preference."""
    first, *others = candidates
    return replace(first, others=tuple(others))


def complete(listing: Listing, raw: Path) -> Listing:
    """What every listing needs, whatever the dataset: nothing is in it twice, and no two sources share a key.

    A key that several sources would have is marked, for all of them, by a hash of their own names; so the order of the
    list plays no part, and all other keys stay what they are.
    """
    listed: dict[tuple[Path, tuple[float, float] | None], Source] = {}
    for source in listing.sources:
        if listed.setdefault((source.path, source.moment_s), source) is not source:
            listing.skipped.append(Skipped(source.entry, LISTED_TWICE))
    sources, rounds = list(listed.values()), 0
    while shared := {key for key, count in Counter(source.key for source in sources).items() if count > 1}:
        # Nearly always one round; the next marks also what happens to be named like a marked key.
        sources = [_with_marked_key(source, raw, rounds) if source.key in shared else source for source in sources]
        rounds += 1
    listing.sources = sources
    return listing


def _with_marked_key(source: Source, raw: Path, rounds: int) -> Source:
    place = os.fsencode(source.path.relative_to(raw))
    return replace(source, key=_marked(source.key, f"{rounds} {source.moment_s} ".encode() + place))
