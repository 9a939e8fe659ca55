"""Activation checkpointing: maps that are not kept for the backward pass, but computed again in it.

The second run must give the first one's maps, bit by bit, and leave no trace of its own: BatchNorm's running statistics
move once a batch. What a BatchNorm has measured over the batch is kept (it is small) and taken again, where it was
measured through `kept`: so a measure that asks other processes does so once, and none waits for another in the second
run. Plain BatchNorms measure the same map anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class _Run(NamedTuple):
    """One of the two runs of a part of a network."""

    again: bool
    measured: dict[nn.Module, Tensor]


_run: _Run | None = None  # the one that goes on; None: what runs now runs once


def recomputed(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """part(x), of which only x is kept for the backward pass, where `part` runs once more.

    Args:
        part: draws nothing at random, and calls each of its BatchNorms once, through `normed` or with `kept`.
        x: not changed in place, here or later.
    """
    if not torch.is_grad_enabled():
        return part(x)
    measured: dict[nn.Module, Tensor] = {}
    y: Tensor = checkpoint(part, x, use_reentrant=False, preserve_rng_state=False,
                           context_fn=lambda: (_running(_Run(False, measured)), _running(_Run(True, measured))))
    return y


def kept(norm: nn.Module, measure: Callable[[], Tensor]) -> Tensor:
    """What `measure` gives, without gradient; in a second run, what it gave in the first, and it is not called.

    Args:
        norm: whose measure it is.
        measure: of the batch; may move running statistics, and ask other processes.
    """
    if _run is not None and _run.again:
        return _run.measured[norm]
    with torch.no_grad():
        found = measure()
    if _run is not None:
        _run.measured[norm] = found
    return found


def normed(x: Tensor, norm: _BatchNorm) -> Tensor:
    """norm(x), (batch, channels, ...), measured by this process; in a second run its running statistics stay as they
    are."""
    if _run is None or not _run.again or not norm.training:
        y: Tensor = norm(x)
        return y
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.0, norm.eps)


@contextmanager
def _running(run: _Run) -> Iterator[None]:
    global _run
    before, _run = _run, run
    try:
        yield
    finally:
        _run = before
