"""A progress bar on a terminal; a line every half minute in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], description: str, unit: str, total: int) -> Iterator[Item]:
    """Pass the items on and show how many of `total` there were, the rate, and the time left."""
    to_terminal = sys.stderr.isatty()
    yield from tqdm(items, description, total, unit=unit, disable=total == 0, dynamic_ncols=to_terminal,
                    mininterval=0.2 if to_terminal else 30.0, smoothing=0.1)
