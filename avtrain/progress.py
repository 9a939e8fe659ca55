"""Progress bars that are lively on a terminal and sparse in a log file, and lines that are said beside them."""

from __future__ import annotations

import logging
import sys
from typing import Any

from avtrain import ranks


def bar_options() -> dict[str, Any]:
    """Options for tqdm: several times a second on a terminal, every half minute elsewhere; of several processes the
    first one has bars."""
    to_terminal = sys.stderr.isatty()
    return {"mininterval": 0.2 if to_terminal else 30.0, "dynamic_ncols": to_terminal, "disable": ranks.rank() > 0}


class _PastBars(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(record.getMessage(), file=sys.stderr)


def say_past_bars() -> None:
    """From now on write what this package logs to stderr, a line each, and leave progress bars whole."""
    log = logging.getLogger(__package__)
    if not any(isinstance(handler, _PastBars) for handler in log.handlers):
        log.addHandler(_PastBars())
