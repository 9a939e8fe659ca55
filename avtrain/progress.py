"""Progress bars that are lively on a terminal and sparse in a log file."""

from __future__ import annotations

import sys
from typing import Any

from avtrain import ranks


def bar_options() -> dict[str, Any]:
    """Options for tqdm: several times a second on a terminal, every half minute elsewhere; of several processes the
    first one has bars."""
    to_terminal = sys.stderr.isatty()
    return {"mininterval": 0.2 if to_terminal else 30.0, "dynamic_ncols": to_terminal, "disable": ranks.rank() > 0}
