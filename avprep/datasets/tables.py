"""Annotation files: rows as they are meant, and one line of the account for each that can't be used."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from avprep.datasets.source import UNUSABLE_ROW, Skipped, printable
from avprep.errors import AvprepError

_LONGEST_TEXT = 200
_LONGEST_RECORD_LINES = 20


@dataclass(frozen=True)
class Row:
    """One row of a table: its values by column, without blanks around them, and where it stands."""

    values: dict[str, str]
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
    """The rows of a CSV file with a header line.

    Args:
        path: the file.
        columns: those that must be there; the first says what a row is about, and is not empty.
        problems: gets a line for each row that has not the header's columns, or is not UTF-8 in those that are read.
        more: columns that are read where they are there.

    Raises:
        AvprepError: a column is missing; the message names it.
    """
    records = _records(path, _lines(path), None)
    _, _, header = next(records, (0, "", None))
    known = {name.lower(): name for name in (*columns, *more)}
    found = [known.get(name.strip().lower(), name.strip()) for name in header or []]
    missing = [name for name in columns if name not in found]
    if missing:
        there = "".join(letter if letter.isprintable() else "?" for letter in printable(", ".join(found)))
        there = there[:_LONGEST_TEXT]
        raise AvprepError(f"{path}: no column {', '.join(missing)} (found: {there})")
    return list(_rows(path, records, found, [*columns, *(name for name in more if name in found)], problems))


def read_rows(path: Path, columns: Sequence[str], problems: list[Skipped]) -> list[Row]:
    """The rows of a file like CSV that has comments (lines that begin with #) in place of a header line."""
    lines = [line if not line.startswith("#") else "\n" for line in _lines(path)]
    return list(_rows(path, _records(path, lines, len(columns)), columns, columns, problems))


def read_lines(path: Path) -> list[Row]:
    """The lines of a text file that are not blank, each as a row without values."""
    return [Row({}, printable(path.name), number, line.strip())
            for number, line in enumerate(_lines(path), 1) if line.strip()]


def time_span(start: str, end: str) -> tuple[float, float] | None:
    """Two times in seconds; None if they are none: no numbers, not finite, before 0, or the end not after the start."""
    try:
        first, last = float(start), float(end)
    except ValueError:
        return None
    return (first, last) if 0 <= first < last and math.isfinite(last) else None


def _lines(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        return list(file)


def _records(path: Path, lines: Sequence[str], width: int | None) -> Iterator[tuple[int, str, list[str] | None]]:
    """(line number, text, values or None if they can't be read) of each record; the first decides how many values.

    A record is one line, or the few lines that a quoted value runs over. So a quote that is never closed costs its own
    line, not the rest of the file.
    """
    at = 0
    while at < len(lines):
        count = 1
        if lines[at].count('"') % 2:
            count = _lines_of_record(lines[at : at + _LONGEST_RECORD_LINES], width)
        text, number, at = "".join(lines[at : at + count]), at + 1, at + count
        if not text.isspace():
            values = _values(text)
            width = width if width is not None or values is None else len(values)
            yield number, text, values


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
    name = printable(path.name)
    for number, text, values in records:
        row = Row(dict(zip(columns, map(str.strip, values or ()), strict=False)), name, number, text.strip())
        too_many = values is not None and any(values[len(columns):])  # a comma at the end of a row does no harm
        if (len(row.values) < len(columns) or too_many or not row.values[needed[0]]
                or not (text.isascii() or all(_is_text(row.values[column]) for column in needed))):
            problems.append(row.skipped(UNUSABLE_ROW))
        else:
            yield row


def _is_text(value: str) -> bool:
    """Whether it was UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)
