"""Annotation files: rows as they are meant, and one line of the account for each that can't be used."""

from __future__ import annotations

import csv
import math
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from avprep.datasets.source import UNUSABLE_ROW, Skipped, printable
from avprep.errors import AvprepError

_LONGEST_TEXT = 200
_LONGEST_RECORD_LINES = 20
_SHORT_TEXT = 10_000
_LONGEST_LINE = 1 << 24  # letters: no list of ours is one line; a file that has no end is not read into memory
_LONGEST_NUMBER = 18  # digits


class Row(NamedTuple):
    """One row of a table: the values of the columns that were asked for, in that order and without blanks around them,
    and where it stands."""

    values: tuple[str, ...]
    table: str
    line: int
    text: str

    @property
    def place(self) -> str:
        """Where it stands, such as 'train.csv line 3'."""
        return f"{self.table} line {self.line}"

    def skipped(self, reason: str) -> Skipped:
        """The row as a line of the account."""
        return Skipped(self.place, reason, printable(self.text)[:_LONGEST_TEXT])


def read_csv(path: Path, columns: Sequence[str], problems: list[Skipped], more: Sequence[str] = ()) -> list[Row]:
    """`stream_csv`, all rows at once."""
    return list(stream_csv(path, columns, problems, more))


def stream_csv(path: Path, columns: Sequence[str], problems: list[Skipped], more: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a CSV file with a header line, as they are read: there may be millions.

    Args:
        path: the file.
        columns: those that must be there; the first says what a row is about, and is not empty.
        problems: gets a line for each row that has not the header's columns, or is not UTF-8 in those that are read.
        more: columns that are read where they are there; else they are empty.

    Raises:
        AvprepError: a column is missing; the message names it.
    """
    records = _records(_lines(path), None)
    _, _, header = next(records, (0, "", None))
    known = {name.lower(): name for name in (*columns, *more)}
    found = [known.get(name.strip().lower(), name.strip()) for name in header or []]
    missing = [name for name in columns if name not in found]
    if missing:
        there = "".join(letter if letter.isprintable() else "?" for letter in printable(", ".join(found)))
        there = there[:_LONGEST_TEXT]
        raise AvprepError(f"{path}: no column {', '.join(missing)} (found: {there})")
    return _rows(path, records, found, (*columns, *more), problems)


def read_rows(path: Path, columns: Sequence[str], problems: list[Skipped]) -> Iterator[Row]:
    """The rows of a file like CSV that has comments (lines that begin with #) in place of a header line."""
    lines = (line if not line.startswith("#") else "\n" for line in _lines(path))
    return _rows(path, _records(lines, len(columns)), columns, columns, problems)


def read_lines(path: Path) -> list[Row]:
    """The lines of a text file that are not blank, each as a row without values."""
    return [Row((), printable(path.name), number, line.strip())
            for number, line in enumerate(_lines(path), 1) if line.strip()]


@lru_cache(maxsize=1 << 16)  # a million rows have a few thousand different ones
def time_span(start: str, end: str) -> tuple[float, float] | None:
    """Two times in seconds; None if they are none: no numbers, not finite, before 0, or the end not after the start."""
    try:
        first, last = float(start), float(end)
    except ValueError:
        return None
    return (first, last) if 0 <= first < last and math.isfinite(last) else None


def whole_number(text: str) -> int | None:
    """A number that is written in digits alone, and not absurdly long; None if it is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _LONGEST_NUMBER else None


def _lines(path: Path) -> Iterator[str]:
    """The lines as they are.

    Raises:
        AvprepError: one is so long that the file is no list.
    """
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(iter(partial(file.readline, _LONGEST_LINE), ""), 1):
            if len(line) == _LONGEST_LINE:
                raise AvprepError(f"{path}: line {number} has {_LONGEST_LINE} letters or more: is it a list?")
            yield line


def _records(lines: Iterator[str], width: int | None) -> Iterator[tuple[int, str, list[str] | None]]:
    """(line number, text, values or None if they can't be read) of each record; the first decides how many values.

    A record is one line, or the few lines that a quoted value runs over. So a quote that is never closed costs its own
    line, not the rest of the file.
    """
    ahead: deque[str] = deque()
    number = 1
    while (text := ahead.popleft() if ahead else next(lines, None)) is not None:
        count = 1
        if '"' not in text and len(text) < _SHORT_TEXT:
            values: list[str] | None = text.split(",")  # what csv would say, in a tenth of the time
        else:
            if text.count('"') % 2:
                ahead.extend(islice(lines, _LONGEST_RECORD_LINES - 1 - len(ahead)))
                count = _lines_of_record([text, *ahead], width)
                text += "".join(ahead.popleft() for _ in range(count - 1))
            values = _values(text)
        if not text.isspace():
            width = width if width is not None or values is None else len(values)
            yield number, text, values
        number += count


def _lines_of_record(lines: Sequence[str], width: int | None) -> int:
    """How many lines there are to the closing quote; 1 if there is none, or they don't make a record of this width."""
    quotes = 0
    for count, line in enumerate(lines, 1):
        quotes += line.count('"')
        if quotes % 2 == 0:
            values = _values("".join(lines[:count]))
            return count if values is not None and len(values) == width else 1
    return 1


def _values(text: str) -> list[str] | None:
    try:
        return next(csv.reader((text,), skipinitialspace=True), None)
    except csv.Error:
        return None


def _rows(path: Path, records: Iterator[tuple[int, str, list[str] | None]], columns: Sequence[str],
          needed: Sequence[str], problems: list[Skipped]) -> Iterator[Row]:
    """`needed`: at least two; those that are not among the columns are empty."""
    name, width = printable(path.name), len(columns)
    chosen = itemgetter(*(columns.index(column) if column in columns else width for column in needed))
    for number, text, cells in records:
        values: tuple[str, ...] = ("",)
        # A comma at the end of a row does no harm.
        if cells and (len(cells) == width or len(cells) > width and not "".join(cells[width:]).strip()):
            cells.append("")
            values = tuple(map(str.strip, chosen(cells)))
        row = Row(values, name, number, text.strip())
        if values[0] and (text.isascii() or all(map(_is_text, values))):
            yield row
        else:
            problems.append(row.skipped(UNUSABLE_ROW))


def _is_text(value: str) -> bool:
    """Whether it was UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)
