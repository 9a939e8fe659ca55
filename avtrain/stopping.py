"""When training stops before its end: a signal came, or the time is up. What is under way is finished, or undone."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

from avtrain import ranks

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_RESERVE = 1.2  # things may take longer than the last time
_UNKNOWN_SHARE = 0.05  # of the time: what is reserved for something that was never done yet


class Interrupted(BaseException):
    """Raised where something long is waited for, when a signal says stop. Like Ctrl-C it passes by other handlers."""


class Stopping:
    """Listens to SIGTERM, SIGUSR1 and Ctrl-C inside the `with` block, in the main thread; and looks at the clock.

    Ctrl-C after any of them raises KeyboardInterrupt at once. A signal that the process ignores stays ignored.

    Args:
        until: when all is to be done, of `time.monotonic`; None: whenever.

    Attributes:
        asked: number of the signal that came; None: none so far.
    """

    def __init__(self, until: float | None) -> None:
        self.asked: int | None = None
        self._until, self._began, self._waits = until, time.monotonic(), False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if (before := signal.getsignal(number)) != signal.SIG_IGN:
                    self._before[number] = signal.SIG_DFL if before is None else before
                    signal.signal(number, self._came)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        # All processes stop where one was told to: what comes to this one later says nothing new, and would end it.
        told = self.asked is not None and ranks.ranks() > 1
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_IGN if told and number != signal.SIGINT else before)

    def _came(self, number: int, frame: object) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = self.asked or number
        if self._waits:
            self._waits = False
            raise Interrupted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """What is done inside is given up when a signal comes, and not begun when one has come.

        Raises:
            Interrupted: so it is.
        """
        self._waits = True
        try:
            if self.asked is not None:
                raise Interrupted
            yield
        finally:
            self._waits = False

    def supply(self, supply: Iterator[Any]) -> Generator[Any, None, None]:
        """The same, where what comes next is waited for only until a signal comes."""
        while True:
            with self.interruptible() if ranks.ranks() == 1 else nullcontext():  # others wait for this one's share
                try:
                    item = next(supply)
                except StopIteration:
                    return
            yield item

    def all_stop(self) -> bool:
        """Whether a signal came, to whichever of the run's processes. All of them call this."""
        self.asked = int(ranks.largest(float(self.asked or 0))) or None
        return self.asked is not None

    def is_time(self, took: Took) -> bool:
        """Whether after another step there would not be time for the end, by the first process's clock. All call this.
        """
        if self._until is None:
            return False
        unknown_s = _UNKNOWN_SHARE * (self._until - self._began)
        is_late = time.monotonic() + took.step_s + _RESERVE * took.end_s(unknown_s) >= self._until
        return ranks.largest(float(is_late and ranks.rank() == 0)) > 0


class Took:
    """How long things took, in seconds: the longest step of this process, and the last one of what the end consists of.

    Args:
        names: of what is done at the end.
    """

    def __init__(self, *names: str) -> None:
        self.step_s = 0.0
        self.last: dict[str, float | None] = dict.fromkeys(names)

    def end_s(self, unknown_s: float) -> float:
        """All that is done at the end, once more."""
        return sum(unknown_s if last is None else last for last in self.last.values())

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Measures what is done inside, if it ends well."""
        began = time.monotonic()
        yield
        self.last[name] = time.monotonic() - began

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measures a step."""
        began = time.monotonic()
        yield
        self.step_s = max(self.step_s, time.monotonic() - began)
