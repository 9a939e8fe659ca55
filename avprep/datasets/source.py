"""What an adapter hands on: sources with labels, each under a key of its own, and what it could not use."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_LONGEST_KEY = 80
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")

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
UNUSABLE_NAME = "a name that no file can have"
EMPTY_FOLDER = "an empty folder, named like a media file"


class Source(NamedTuple):
    """One file with its labels, as a dataset lists it. There may be millions: what follows from the rest is not kept.

    Attributes:
        key: unique in the split, of `[A-Za-z0-9_-]` only: safe as a member name in any tar.
        raw: the raw folder.
        before: where the file is below it, as far as the entry, which is mostly a part of the name; else all of it.
        entry: what the dataset calls it, before that was made safe as a key.
        after: what follows in the name; None if the entry is no part of it.
        labels: indices into the class list, none twice.
        moment_s: start and end of the annotated moment in the file, where the file may be longer than it.
        label_times_s: of each label, in the order of `labels`, the (start, end) in the file of each time it is given;
            None: all the time.
        others: further files of the same id, in order of preference; whoever opens them takes the best.
    """

    key: str
    raw: Path
    before: str
    entry: str
    after: str | None
    labels: tuple[int, ...] = ()
    moment_s: tuple[float, float] | None = None
    label_times_s: tuple[tuple[tuple[float, float], ...], ...] | None = None
    others: tuple[Source, ...] = ()

    @property
    def place(self) -> str:
        """Where the file is below the raw folder."""
        return self.before if self.after is None else f"{self.before}{self.entry}{self.after}"

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self.raw / self.place

    @property
    def name(self) -> str:
        """What reports and samples call it: the path below the raw folder, printable."""
        return printable(self.place)

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
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


def name_of(path: Path, raw: Path) -> str:
    """What reports call a file: its printable path below the raw folder."""
    return printable(path.relative_to(raw).as_posix())


def safe_key(name: str) -> str:
    """A member name for any tar, without a dot (readers split at the first one)."""
    if _SAFE.fullmatch(name) and len(name) <= _LONGEST_KEY:
        return name
    key = _UNSAFE.sub("_", name).lstrip("-")
    return key if key == name and len(key) <= _LONGEST_KEY else _marked(key, os.fsencode(name))


def _marked(key: str, distinction: bytes) -> str:
    return f"{key[:_LONGEST_KEY - 9]}_{hashlib.sha1(distinction).hexdigest()[:8]}"


def source_of(path: Path | str, raw: Path, labels: Iterable[int] = (), *, key: str | None = None,
              moment_s: tuple[float, float] | None = None,
              label_times_s: tuple[tuple[tuple[float, float], ...], ...] | None = None) -> Source:
    """A source named by its file's place under the raw folder (text is such a place); `key` where the dataset has a
    shorter name for it."""
    place = path if isinstance(path, str) else path.relative_to(raw).as_posix()
    entry = key or place[: len(place) - len(PurePosixPath(place).suffix)]
    at, after = place.rfind(entry), None
    if at >= 0:
        place, after = sys.intern(place[:at]), sys.intern(place[at + len(entry):])
    return Source(safe_key(entry), raw, place, entry, after, tuple(dict.fromkeys(labels)), moment_s, label_times_s)


def one_of(candidates: Iterable[Source]) -> Source:
    """One source of several files for the same id, in order of preference."""
    first, *others = candidates
    return first._replace(others=tuple(others)) if others else first


def complete(listing: Listing) -> Listing:
    """What every listing needs, whatever the dataset: nothing is in it twice, and no two sources share a key.

    A key that several sources would have is marked, for all of them, by a hash of their own names; so the order of the
    list plays no part, and all other keys stay what they are.
    """
    seen: set[str | tuple[str, tuple[float, float]]] = set()
    sources, rounds = [], 0
    for source in listing.sources:
        what = source.place if source.moment_s is None else (source.place, source.moment_s)
        if what in seen:
            listing.skipped.append(Skipped(printable(source.entry), LISTED_TWICE))
        else:
            seen.add(what)
            sources.append(source)
    del seen
    while len({source.key for source in sources}) < len(sources):
        shared = _shared(source.key for source in sources)
        # Nearly always one round; the next marks also what happens to be named like a marked key.
        sources = [_with_marked_key(source, rounds) if source.key in shared else source for source in sources]
        rounds += 1
    listing.sources = sources
    return listing


def _shared(keys: Iterable[str]) -> set[str]:
    """Those that are there more than once."""
    seen: set[str] = set()
    shared: set[str] = set()
    for key in keys:
        (shared if key in seen else seen).add(key)
    return shared


def _with_marked_key(source: Source, rounds: int) -> Source:
    return source._replace(key=_marked(source.key, f"{rounds} {source.moment_s} ".encode() + os.fsencode(source.place)))
