"""Rows as they are measured: printed at once, and the JSON written anew after each, so a run cut off has shown much."""

from __future__ import annotations

import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


class Report:
    """The table, the file, and the time that is left.

    Args:
        out: JSON file; None: only the table.
        seconds: of the whole run.
        shares: of each part to come, by number; what a part leaves is shared among those after it.
    """

    def __init__(self, out: Path | None, seconds: float, shares: dict[int, float]) -> None:
        self._out, self._shares = out, dict(shares)
        self._began = time.monotonic()
        self._end, self._part_end, self._part = self._began + seconds, self._began, 0
        self.content: dict[str, Any] = {"rows": []}

    def begin(self, part: int, title: str) -> None:
        """Start a part: its share of the time that is left begins to run."""
        rest = sum(share for number, share in self._shares.items() if number >= part)
        now = time.monotonic()
        self._part, self._part_end = part, now + max(0.0, self._end - now) * self._shares[part] / rest
        print(f"\n{part}. {title} ({self._part_end - now:.0f} s; {now - self._began:.0f} s are gone)", flush=True)

    def left(self) -> float:
        """Seconds that this part may still take."""
        return self._part_end - time.monotonic()

    def add(self, name: str, figures: Figures) -> None:
        """One row."""
        self.content["rows"].append({"part": self._part, "name": name, **figures})
        shown = "  ".join(f"{key} {_shown(value)}" for key, value in figures.items()
                          if not isinstance(value, dict | list))
        print(f"  {name:<52} {shown}", flush=True)
        if self._out is not None:
            part = self._out.with_suffix(".part")
            part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            part.replace(self._out)

    def measure(self, name: str, function: Callable[[], Figures], needs_s: float = 1.0,
                limit_s: float = 0.0) -> Figures | None:
        """A row of what the function gives, or of why it could not; passed over where its part's time is used up.

        Args:
            limit_s: the function is ended after so many seconds (0: never).
        """
        if self.left() < needs_s:
            self.add(name, {"passed_over": "no time left"})
            return None
        began = time.monotonic()
        try:
            with _limited(limit_s):
                figures = function()
        except Exception as error:  # one measure that fails, however it does, must not cost the others
            text = str(error).strip().splitlines()
            self.add(name, {"error": f"{type(error).__name__}: {text[0][:160] if text else ''}",
                            "trace": traceback.format_exc().splitlines()[-12:]})
            return None
        self.add(name, {**figures, "took_s": time.monotonic() - began})
        return figures


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def end(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
