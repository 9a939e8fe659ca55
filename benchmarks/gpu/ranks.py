"""Part 6: processes under torchrun, as `avtrain pretrain` runs them: one with NCCL, and two on the same GPU (gloo)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from time import perf_counter

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from avtrain import ranks
from avtrain.config import read_config
from avtrain.data.order import Cut
from avtrain.pretraining.draw import Clips, draws_of
from avtrain.pretraining.module import Pretraining
from benchmarks.gpu.correct import exact_float32
from benchmarks.gpu.device import synchronize
from benchmarks.gpu.report import Figures, Report
from benchmarks.gpu.steps import all_there, random_batch

_CLIPS, _STEPS = 4, 6
_SAME = 1e-4  # relative, of losses in float32, which parts are added up in another order


def run(report: Report, preset: str, changes: list[str], device: torch.device) -> None:
    """All rows of this part: the same losses as one process without any of it."""
    alone: list[float] = []

    def compared(count: int, backend: str) -> Figures:
        figures = launched(count, backend, preset, changes, device)
        alone[:] = alone or figures["losses"]
        apart = [abs(one - other) / abs(one) for one, other in zip(alone, figures["losses"], strict=True)]
        return {**figures, "first_difference": apart[0], "largest_difference": max(apart), "ok": apart[0] < _SAME}

    report.measure("one process, nothing shared", lambda: compared(1, ""), 10)
    one = "nccl" if device.type == "cuda" else "gloo"
    report.measure(f"one process, {one}: BatchNorm, negatives and gradients over all", lambda: compared(1, one), 10)
    report.measure("two processes on one device, gloo", lambda: compared(2, "gloo"), 15)


def launched(count: int, backend: str, preset: str, changes: list[str], device: torch.device) -> Figures:
    """What the first process under torchrun printed last."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                           str(count), "-m", "benchmarks.gpu.ranks", str(device), backend, preset, *changes],
                          capture_output=True, text=True, timeout=200, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-400:].replace("\n", " "))
    figures: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def measured(backend: str, preset: str, changes: list[str], device: torch.device) -> Figures:
    """Losses in float32, and milliseconds a step, from the same start."""
    if device.type == "cuda":
        torch.cuda.set_device(0)
        device = torch.device("cuda", 0)
    if backend:
        dist.init_process_group(backend)
    config = read_config(preset, [*changes, "model.dropout=0"])
    cut = Cut(_CLIPS, _CLIPS // ranks.ranks(), ranks.rank(), ranks.ranks())
    own = slice(cut.rank * cut.micro_batch, (cut.rank + 1) * cut.micro_batch)
    batch = [tensor[own] for tensor in random_batch(config, _CLIPS, device)]
    present = torch.ones(_CLIPS, config.data.segments, dtype=torch.bool)
    clips = Clips(present, present, [str(clip) for clip in range(_CLIPS)])
    torch.manual_seed(0)
    network: nn.Module = Pretraining(config).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, betas=(0.9, 0.98), amsgrad=True, fused=True)
    if backend:
        network.model.measure_over_ranks()  # type: ignore[operator,union-attr]
        network = DistributedDataParallel(network, [device] if device.type == "cuda" else None)
    losses, taken = [], []
    with exact_float32():
        for step in range(_STEPS):
            synchronize(device)
            began = perf_counter()
            [draw] = draws_of(clips, cut, config.objectives, 0, step, pairs=True)
            loss = network(*all_there(*batch), draw.to(device)).loss
            (loss * ranks.ranks()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(ranks.summed(loss)))
            synchronize(device)
            taken.append(perf_counter() - began)
    return {"backend": backend or "none", "ranks": ranks.ranks(), "ms": 1000 * sorted(taken[2:])[len(taken[2:]) // 2],
            "losses": losses}


if __name__ == "__main__":
    place, group, preset_name, *settings = sys.argv[1:]
    found = measured(group, preset_name, settings, torch.device(place))
    ranks.end()
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(found))
