"""What an adapter hands on: sources with labels. And the few helpers that several adapters share."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from avprep.errors import AvprepError

VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".webm", ".avi", ".mov", ".flv", ".m4v", ".mpg", ".mpeg", ".3gp", ".ts"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3", ".m4a", ".opus", ".aac"})
_LONGEST_KEY = 80


@dataclass(frozen=True)
class Source:
    """One file with its labels, as a dataset lists it.

    Attributes:
        key: unique in the split, of [A-Za-z0-9_-] only: safe as a member name in any tar.
        path: where the file is.
        name: the path relative to the raw folder: what reports and samples call it.
        labels: indices into the class list.
        moment_s: start and end of the annotated moment in the file, where the file may be longer than it.
        label_times_s: start and end in the file of each label, in the order of `labels`; None: all the time.
    """

    key: str
    path: Path
    name: str
    labels: tuple[int, ...] = ()
    moment_s: tuple[float, float] | None = None
    label_times_s: tuple[tuple[float, float], ...] | None = None


@dataclass
class Listing:
    """A split as its annotation lists it.

    Attributes:
        classes: names; a label is an index into them.
        sources: the files that are there.
        skipped: (name, reason) of what is listed but can't be used.
        multi_label: whether a source may have several labels.
    """

    classes: list[str]
    sources: list[Source] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    multi_label: bool = False


MISSING_FILE = "listed, but no such file"
LISTED_TWICE = "listed twice"
NOT_MEDIA = "not named like a media file"


def safe_key(name: str) -> str:
    """A member name for any tar, without a dot (readers split at the first one); distinct for distinct names."""
    key = re.sub(r"[^A-Za-z0-9_-]", "_", name).lstrip("-")
    if key != name or len(key) > _LONGEST_KEY:
        key = f"{key[:_LONGEST_KEY - 9]}_{hashlib.sha1(name.encode()).hexdigest()[:8]}"
    return key


def source_of(path: Path, raw: Path, labels: tuple[int, ...] = (), *, key: str | None = None,
              moment_s: tuple[float, float] | None = None,
              label_times_s: tuple[tuple[float, float], ...] | None = None) -> Source:
    """A source named by its file's place under the raw folder; `key` where the dataset has a shorter unique name."""
    name = path.relative_to(raw).as_posix()
    return Source(safe_key(key or name[: len(name) - len(path.suffix)]), path, name, labels, moment_s, label_times_s)


def all_files(folder: Path) -> Iterator[Path]:
    """All files below `folder`, in sorted order; hidden ones are passed over."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def is_media(path: Path) -> bool:
    """Whether the file's name ends like that of a video or a sound file."""
    return path.suffix.lower() in VIDEO_SUFFIXES | AUDIO_SUFFIXES


def read_csv(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with a header line.

    Raises:
        AvprepError: a wanted column is missing, or the text is not UTF-8.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            found = list(reader.fieldnames or [])
            missing = [name for name in columns if name not in found]
            if missing:
                raise AvprepError(f"{path}: no column {', '.join(missing)} (found: {', '.join(found)})")
            return list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise AvprepError(f"{path} is not a readable CSV file: {error}") from error


def number(text: str, path: Path) -> float:
    """A number in an annotation file.

    Raises:
        AvprepError: it is none; the message names the file.
    """
    try:
        return float(text)
    except ValueError as error:
        raise AvprepError(f"{path}: {text!r} stands where a number is expected") from error


def first_existing(candidates: Iterable[Path]) -> Path | None:
    """The first of these paths that is there."""
    return next((path for path in candidates if path.exists()), None)
