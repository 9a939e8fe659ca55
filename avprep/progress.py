"""A progress bar on a terminal; a line every half minute in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
_TELL_EVERY_S = 1.0


def progress(items: Iterable[Item], description: str, unit: str, total: int) -> Iterator[Item]:
    """Pass the items on and show how many of `total` there were, the rate, and the time left."""
    with Count(description, unit, total) as count:
        for item in items:
            yield item
            count.add()


class Count:
    """How much is done of what is expected, shown as it grows; any thread may count. Without a total, nothing is shown.

    A context manager: leaving it ends the bar.

    Args:
        description: stands before the bar.
        unit: what is counted.
        total: expected so far.
        tell: gets (done, expected) now and then, where the bar is another process's.
    """

    def __init__(self, description: str = "", unit: str = "", total: int = 0,
                 tell: Callable[[int, int], object] | None = None) -> None:
        to_terminal = sys.stderr.isatty()
        self._bar = tqdm(None, description, total, unit=unit, disable=total == 0, dynamic_ncols=to_terminal,
                         mininterval=0.2 if to_terminal else 30.0, smoothing=0.1)
        self._lock = threading.Lock()
        self._tell, self._told_at_s = tell, time.monotonic()
        self.done, self.expected = 0, total

    def expect(self, more: int) -> None:
        """There is more to do than it seemed, or less."""
        with self._lock:
            self.expected += more
            self._bar.total = self.expected
            self._tell_on()

    def add(self, done: int = 1) -> None:
        """So much more is done."""
        with self._lock:
            self.done += done
            self._bar.update(done)
            self._tell_on()

    def at_least(self, done: int) -> None:
        """Catch up with what was done where nobody counted."""
        self.add(max(0, done - self.done))

    def _tell_on(self) -> None:
        now_s = time.monotonic()
        if self._tell is not None and now_s - self._told_at_s >= _TELL_EVERY_S:
            self._told_at_s = now_s
            self._tell(self.done, self.expected)

    def __enter__(self) -> Count:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
