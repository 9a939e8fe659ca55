"""Part 5: a run that is killed and gone on with gives the same losses as one that is not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from avtrain.config import Config, read_config
from avtrain.engine import Run
from avtrain.pretraining.module import Pretraining
from avtrain.pretraining.optimizer import pretraining_optimizer
from avtrain.run_folder import RunFolder
from avtrain.runtime import choose_runtime, seed_everything
from benchmarks.gpu.report import Figures, Report
from benchmarks.gpu.steps import all_there, draw_of_noise, random_batch

_STEPS, _SAVED, _KILLED = 4, 2, 4


@dataclass
class _Noise:
    """A batch as the loop takes it."""

    tensors: tuple[Tensor, ...]
    keys: list[str]


class NoiseBatches:
    """Two clips a batch, each batch another one, for the engine."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._visual, self._audio, *self._present = random_batch(config, 2, device)

    batch_size, parts = 2, 1

    def __len__(self) -> int:
        return 1000

    def starting_at(self, first: int) -> Iterator[_Noise]:
        """From that clip on."""
        batch = first // 2
        while True:
            visual = self._visual.roll(7 * batch + 1, dims=-1)
            yield _Noise((visual, self._audio.roll(batch, dims=-1), *self._present), ["one", "other"])
            batch += 1


def train(folder: Path, config: Config, device: torch.device, die: bool, deterministic: bool) -> None:
    """A few steps with the engine; `die`: the process ends at once, as if killed, in the step after a checkpoint."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    config = replace(config, training=replace(config.training, steps=_STEPS, save_every=_SAVED, batch_size=2,
                                              evaluate_every=1000, log_every=1, warmup=0.0, micro_batch=None))
    runtime = choose_runtime(str(device), "bfloat16")
    seed_everything(0)
    network = Pretraining(config).to(device).train()
    modules: dict[str, nn.Module] = {"model": network.model, "objectives": network.objectives}
    run = Run(RunFolder(folder), modules, pretraining_optimizer(modules, config.training), config.training,
              lambda part: None)
    supply = NoiseBatches(config, device)
    run.go_on(supply)

    def step(batch: _Noise, part: int) -> tuple[Tensor, dict[str, Tensor]]:
        if die and run.position.step == _KILLED - 1:
            os._exit(9)
        return network(*all_there(*batch.tensors), draw_of_noise(config, 2, run.position.step, device)).loss, {}

    run.train(step, supply, runtime.autocast, dict)


def run(report: Report, preset: str, changes: list[str], device: torch.device, folder: Path) -> None:
    """All rows of this part."""
    for name, deterministic in (("killed and gone on with, deterministic", True), ("the same, default kernels", False)):
        report.measure(name, lambda fixed=deterministic: compared(preset, changes, device, folder, fixed),
                       15 if deterministic else 25)


def compared(preset: str, changes: list[str], device: torch.device, folder: Path, deterministic: bool) -> Figures:
    """The largest difference between the losses of a whole run and of one killed and resumed."""
    whole, broken = (folder / f"{kind}-{deterministic}" for kind in ("whole", "broken"))

    def start(where: Path, how: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        command = [sys.executable, "-m", "benchmarks.gpu.resume", str(where), how, str(int(deterministic)),
                   str(device), preset, *changes]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)

    beside = start(whole, "whole")
    for how, code in (("die", 9), ("resume", 0), ("", 0)):
        process = start(broken, how) if how else beside
        error = process.communicate(timeout=120)[1]
        if process.returncode != code:
            raise RuntimeError(error[-150:].decode())
    one, other = (RunFolder(where).lines() for where in (whole, broken))
    differences = [abs(left["loss"] - right["loss"]) for left, right in zip(one, other, strict=True)]
    slowest = sorted(2000 / line["clips_per_s"] for line in one)[len(one) // 2]
    return {"steps": len(one), "largest_difference": max(differences), "ok": not deterministic or max(differences) == 0,
            "ms_a_step_of_2_clips": slowest, "losses": [line["loss"] for line in one]}


if __name__ == "__main__":
    target, mode, fixed, place, preset_name, *settings = sys.argv[1:]
    train(Path(target), read_config(preset_name, settings), torch.device(place), mode == "die", fixed == "1")
