"""A progress bar on a terminal; a line every half minute in a log file."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], description: str, unit: str, total: int) -> Iterator[Item]:
    """Pass the items on and show how many of `total` there were, the rate, and the time left."""
    with Count(description, unit, total) as count:
        for item in items:
            yield item
            count.add()


class Count:
    """How much is done of what is expected, shown as it grows; any thread may count. Without a total, nothing is shown.

    A context manager: leaving it ends the bar.
    """

    def __init__(self, description: str = "", unit: str = "", total: int = 0) -> None:
        to_terminal = sys.stderr.isatty()
        self._bar = tqdm(None, description, total, unit=unit, disable=total == 0, dynamic_ncols=to_terminal,
                         mininterval=0.2 if to_terminal else 30.0, smoothing=0.1)
        self._lock = threading.Lock()
        self._done, self._expected = 0, total

    def expect(self, more: int) -> None:
        """There is more to do than it seemed, or less."""
        with self._lock:
            self._expected += more
            self._bar.total = self._expected

    def add(self, done: int = 1) -> None:
        """So much more is done."""
        with self._lock:
            self._done += done
            self._bar.update(done)

    def at_least(self, done: int) -> None:
        """Catch up with what was done where nobody counted."""
        self.add(max(0, done - self._done))

    def __enter__(self) -> Count:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
