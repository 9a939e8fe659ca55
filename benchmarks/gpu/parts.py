"""Part 2, on a GPU: gradients of a step's parts add up, with graphs and stages run again too, and nothing waits."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from avtrain.config import Config
from avtrain.finite_steps import FiniteSteps
from avtrain.models.graphs import capture, own_gradients
from avtrain.pretraining.module import Pretraining
from avtrain.pretraining.optimizer import pretraining_optimizer
from benchmarks.gpu.report import Figures, Report
from benchmarks.gpu.steps import all_there, draw_of_noise, random_batch
from benchmarks.gpu.whole import relative

_CLIPS, _PARTS, _STEPS = 4, 3, 3
_AS_GOOD = 1.5  # times the difference of two runs without graphs, which add in another order


def run(report: Report, config: Config, device: torch.device) -> None:
    """All rows."""
    found: dict[str, tuple[list[float], list[Tensor]]] = {}
    for name, graphs, stages in (("plain", False, 0), ("plain again", False, 0), ("graphs", True, 0),
                                 ("first stage again", False, 1), ("graphs, first stage again", True, 1)):
        def measured(name: str = name, graphs: bool = graphs, stages: int = stages) -> Figures:
            found[name] = added_up(config, device, graphs, stages)
            losses, gradients = found[name]
            plain = found["plain"]
            apart = max(map(relative, gradients, plain[1]))
            limit = _AS_GOOD * max(map(relative, found["plain again"][1], plain[1])) if len(found) > 2 else math.inf
            return {"gradients_differ": apart, "limit": limit, "ok": apart <= limit or apart < 1e-6,
                    "losses_differ": max(abs(one - other) for one, other in zip(losses, plain[0], strict=True)),
                    "norms": [float(gradient.norm()) for gradient in gradients], "losses": losses}

        report.measure(f"{_PARTS} parts of {_CLIPS} clips added up: {name}", measured, 3)


def added_up(config: Config, device: torch.device, graphs: bool, stages: int) -> tuple[list[float], list[Tensor]]:
    """Every part's loss, and every step's gradient in a line; from the second step on any waiting is an error."""
    config = replace(config, model=replace(config.model, dropout=0.0, stages_recomputed=stages))
    torch.manual_seed(0)
    network = Pretraining(config).to(device).train()
    visual, audio, *present = random_batch(config, _PARTS * _CLIPS, device)
    if graphs:
        capture(network.model, visual[:_CLIPS], audio[:_CLIPS], config.objectives.draws, torch.bfloat16, True)
    own_gradients(network)
    optimizer = pretraining_optimizer({"model": network.model, "objectives": network.objectives},
                                      replace(config.training, learning_rate=1e-5))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    finite = FiniteSteps([network], device)
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    draws = [draw_of_noise(config, _CLIPS, number, device) for number in range(_STEPS * _PARTS)]
    for step in range(_STEPS):
        with _no_waiting(step > 0 and device.type == "cuda"):
            for part in range(_PARTS):
                some = slice(part * _CLIPS, (part + 1) * _CLIPS)
                with torch.autocast(device.type, torch.bfloat16):
                    result = network(*all_there(*(tensor[some] for tensor in (visual, audio, *present))),
                                     draws[step * _PARTS + part])
                result.loss.backward()
                losses.append(result.loss.detach())
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))  # type: ignore[union-attr]
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.found_inf = finite.after(losses[-1], norm)  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    read = [float(loss) for loss in losses]
    del network, optimizer, parameters, finite
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return read, gradients


@contextmanager
def _no_waiting(wanted: bool) -> Iterator[None]:
    """Waiting for the device is an error."""
    if not wanted:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
