"""Part 6: the same step in one process under torchrun, wrapped in DistributedDataParallel."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from time import perf_counter

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from avtrain.config import read_config
from avtrain.pretraining.module import Pretraining
from benchmarks.gpu.device import synchronize
from benchmarks.gpu.report import Figures, Report
from benchmarks.gpu.steps import all_there, draw_of_noise, random_batch

_CLIPS, _STEPS = 2, 6


def run(report: Report, preset: str, changes: list[str], device: torch.device) -> None:
    """All rows of this part."""
    report.measure("torchrun, one process, DDP against none", lambda: launched(preset, changes, device), 15)


def launched(preset: str, changes: list[str], device: torch.device) -> Figures:
    """What the process under torchrun printed last."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--master-addr",
                           "127.0.0.1", "--master-port", "29517", "-m", "benchmarks.gpu.ranks", str(device), preset,
                           *changes], capture_output=True, text=True, timeout=150, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-400:].replace("\n", " "))
    figures: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def measured(preset: str, changes: list[str], device: torch.device) -> Figures:
    """Losses and milliseconds a step, wrapped and not, from the same start."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(0)
        device = torch.device("cuda", 0)
    torch.distributed.init_process_group(backend)
    config = read_config(preset, changes)
    batch = random_batch(config, _CLIPS, device)
    figures: Figures = {"backend": backend, "ranks": torch.distributed.get_world_size()}
    losses: dict[str, list[float]] = {}
    for name in ("alone", "wrapped"):
        torch.manual_seed(0)
        module: nn.Module = Pretraining(config).to(device).train()
        if name == "wrapped":
            module = DistributedDataParallel(module, device_ids=[0] if device.type == "cuda" else None)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, betas=(0.9, 0.98), amsgrad=True, fused=True)
        losses[name], taken = [], []
        for step in range(_STEPS):
            synchronize(device)
            began = perf_counter()
            with torch.autocast(device.type, torch.bfloat16):
                loss = module(*all_there(*batch), draw_of_noise(config, _CLIPS, step, device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[name].append(float(loss.detach()))
            synchronize(device)
            taken.append(perf_counter() - began)
        figures[f"{name}_ms"] = 1000 * statistics.median(taken[2:])
    torch.distributed.destroy_process_group()
    differences = [abs(one - other) / abs(one) for one, other in zip(*losses.values(), strict=True)]
    return {**figures, "first_difference": differences[0], "largest_difference": max(differences), "losses": losses,
            "ok": differences[0] < 1e-3}


if __name__ == "__main__":
    place, preset_name, *settings = sys.argv[1:]
    print(json.dumps(measured(preset_name, settings, torch.device(place))))
