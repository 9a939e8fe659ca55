"""Figures that are promised, measured: each module's `run` returns rows of one table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measured figure beside what it is compared to."""

    name: str
    unit: str
    ours: float
    baseline: float
    ratio: float
    bound: str
    ok: bool


def times_faster(name: str, ours: float, baseline: float, at_least: float) -> Row:
    """Seconds of both; the ratio is baseline / ours."""
    ratio = baseline / ours
    return Row(name, "s", ours, baseline, ratio, f">= {at_least:g}", ratio >= at_least)


def share_of(name: str, unit: str, ours: float, baseline: float, at_most: float) -> Row:
    """What costs something and what it may be compared to; the ratio is ours / baseline."""
    ratio = ours / baseline
    return Row(name, unit, ours, baseline, ratio, f"<= {at_most:g}", ratio <= at_most)


def interleaved_medians(rounds: int, *steps: Callable[[], object],
                        clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Median seconds of each step, run in turn so that a busy machine disturbs all alike; one round warms up."""
    seconds: list[list[float]] = [[] for _ in steps]
    for index in range(rounds + 1):
        for step, kept in zip(steps, seconds, strict=True):
            start = clock()
            step()
            if index:
                kept.append(clock() - start)
    return [statistics.median(kept) for kept in seconds]
