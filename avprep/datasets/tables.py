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
    place: str
    text: str

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
    found = [name.strip() for name in header or []]
    missing = [name for name in columns if name not in found]
    if missing:
        there = printable(", ".join(found))[:_LONGEST_TEXT]
        raise AvprepError(f"{path}: no column {', '.join(missing)} (found: {there})")
    return list(_rows(path, records, found, [*columns, *(name for name in more if name in found)], problems))


def read_rows(path: Path, columns: Sequence[str], problems: list[Skipped]) -> list[Row]:
    """The rows of a file like CSV that has comments (lines that begin with #) in place of a header line."""
    lines = [line if not line.startswith("#") else "\n" for line in _lines(path)]
    return list(_rows(path, _records(path, lines, len(columns)), columns, columns, problems))


def read_lines(path: Path) -> list[Row]:
    """The lines of a text file that are not blank, each as a row without values."""
    return [Row({}, f"{printable(path.name)} line {number}", line.strip())
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
        count = _lines_of_record(lines[at : at + _LONGEST_RECORD_LINES], width)
        record, number, at = lines[at : at + count], at + 1, at + count
        if "".join(record).strip():
            values = _values(record)
            width = width if width is not None or values is None else len(values)
            yield number, "".join(record).strip(), values


def _lines_of_record(lines: Sequence[str], width: int | None) -> int:
    quotes = 0
    for count, line in enumerate(lines, 1):
        quotes += line.count('"')
        if quotes % 2 == 0:
            values = _values(lines[:count])
            return count if count == 1 or (values is not None and len(values) == width) else 1
    return 1


def _values(lines: Sequence[str]) -> list[str] | None:
    try:
        return next(csv.reader(lines, skipinitialspace=True), None)
    except csv.Error:
        return None


def _rows(path: Path, records: Iterator[tuple[int, str, list[str] | None]], columns: Sequence[str],
          needed: Sequence[str], problems: list[Skipped]) -> Iterator[Row]:
    for number, text, values in records:
        row = Row(dict(zip(columns, (value.strip() for value in values or []), strict=False)),
                  f"{printable(path.name)} line {number}", text)
        too_many = any(values[len(columns):]) if values else False  # a comma at the end of a row does no harm
        if (len(row.values) < len(columns) or too_many or not row.values[needed[0]]
                or not all(_is_text(row.values[name]) for name in needed)):
            problems.append(row.skipped(UNUSABLE_ROW))
        else:
            yield row


def _is_text(value: str) -> bool:
    """Whether it was UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)
