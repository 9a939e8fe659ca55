"""`python -m benchmarks.rehearsal.timed FILE pretrain ...`: the `avtrain` command, with a line in FILE for every step:
seconds of the networks, of the optimiser, of waiting for data, and of all else that the main process does."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from avtrain.cli import main
from avtrain.data.loader import Epochs
from avtrain.pretraining.held_out import HeldOut
from avtrain.pretraining.module import Pretraining
from avtrain.run_folder import RunFolder

_spent: dict[str, float] = defaultdict(float)
_began = time.monotonic()


def _timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.monotonic()
        try:
            return function(*arguments, **options)
        finally:
            _spent[name] += time.monotonic() - start

    return timed


def _waits(supply: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    def timed(*arguments: Any) -> Iterator[Any]:
        parts = supply(*arguments)
        while True:
            start = time.monotonic()
            part = next(parts)
            _spent["waiting"] += time.monotonic() - start
            yield part

    return timed


def watch(path: Path) -> None:
    """Time the pieces of every step, which ends where the optimiser is done."""
    Pretraining.forward = _timed("networks", Pretraining.forward)  # type: ignore[method-assign]
    torch.Tensor.backward = _timed("networks", torch.Tensor.backward)  # type: ignore[method-assign]
    nn.utils.clip_grad_norm_ = _timed("optimiser", nn.utils.clip_grad_norm_)
    Epochs.starting_at = _waits(Epochs.starting_at)  # type: ignore[method-assign]
    HeldOut.figures = _timed("evaluation", HeldOut.figures)  # type: ignore[method-assign]
    RunFolder.save = _timed("save", RunFolder.save)  # type: ignore[method-assign]
    step, last = torch.optim.AdamW.step, [_began]

    def stepped(*arguments: Any, **options: Any) -> Any:
        result = _timed("optimiser", step)(*arguments, **options)
        now = time.monotonic()
        line = {"at": now - _began, "seconds": now - last[0], **_spent}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        _spent.clear()
        last[0] = now
        return result

    torch.optim.AdamW.step = stepped  # type: ignore[method-assign]


if __name__ == "__main__":
    watch(Path(sys.argv.pop(1)))
    main(prog_name="avtrain")
