"""The one training loop. It knows neither model nor data: it is handed a step, batches and what to save."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from avtrain.config import TrainingConfig
from avtrain.errors import AvtrainError
from avtrain.files import written_whole
from avtrain.progress import bar_options

_MOST_BAD_STEPS = 10
_STATE = "training.pt"
_TOKEN_VECTORS = {"bos", "modality", "positions", "mask"}


class Batches(Protocol):
    """What the loop needs of the data."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def starting_at(self, epoch: int, batch: int) -> Iterator[Any]:
        """The batches from that one on, over the epochs and without end, the same every time."""


# (batch) -> (loss, figures to log); called with gradients on, inside autocast.
Step = Callable[[Any], tuple[Tensor, dict[str, float]]]


@dataclass
class Position:
    """How far the run is: optimiser steps, and where in the data. The next batch is `batch` of `epoch`."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    skipped_steps: int = 0


class Run:
    """A training run in a folder: `metrics.jsonl`, `checkpoints/step-NNNNNN/`, TensorBoard events.

    Args:
        folder: of the run.
        modules: by name; their weights are saved in `training.pt` and trained.
        config: optimiser, schedule, intervals.
        generator: of masks, pairs and negatives; its state is saved and restored.
        save_weights: writes what others use of a checkpoint (the model's own file) into its folder.
        optimizer: instead of pretraining's AdamW; a group with a `rate_scale` gets that share of the learning rate.
    """

    def __init__(self, folder: Path, modules: dict[str, nn.Module], config: TrainingConfig,
                 generator: torch.Generator, save_weights: Callable[[Path], None],
                 optimizer: torch.optim.Optimizer | None = None) -> None:
        self.folder, self.modules, self.config, self.generator = folder, modules, config, generator
        self.position = Position()
        self.bad_steps = 0  # the last ones, in a row, that were not finite
        self._save_weights = save_weights
        self._optimizer = optimizer or torch.optim.AdamW(
            parameter_groups(modules, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.98), amsgrad=True)
        self._metrics = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def train(self, step: Step, batches: Batches, autocast: Callable[[], Any],
              evaluate: Callable[[], dict[str, float]], max_steps: int | None = None,
              max_time_s: float | None = None) -> None:
        """Train until the schedule's end, `max_steps`, or `max_time_s` of this call; evaluates and saves at the end.

        Raises:
            AvtrainError: the loss was not finite ten times in a row, or at the end, without a
                checkpoint from before.
        """
        from torch.utils.tensorboard.writer import SummaryWriter  # seconds at first import

        if self.position.step == 0:
            self._metrics.unlink(missing_ok=True)  # of a run that was stopped before its first checkpoint
        end = min(self.config.steps, max_steps or self.config.steps)
        started, self.bad_steps = time.monotonic(), 0
        buffers = [buffer for module in self.modules.values() for buffer in module.buffers()]
        good_buffers = [buffer.clone() for buffer in buffers]
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        supply = self._supply(batches)
        with SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.position.step + 1) as writer, tqdm(
                initial=self.position.step, total=end, desc="train", unit="step", **bar_options()) as bar:
            while self.position.step < end and not (max_time_s and time.monotonic() - started >= max_time_s):
                rate = learning_rate(self.position.step, self.config)
                for group in self._optimizer.param_groups:
                    group["lr"] = rate * group.get("rate_scale", 1.0)
                began = time.monotonic()
                figures, waited_s, clips = self._accumulate(step, supply, autocast)
                norm = nn.utils.clip_grad_norm_(parameters, self.config.clip_norm or math.inf)
                if math.isfinite(figures["loss"]) and bool(torch.isfinite(norm)):
                    self._optimizer.step()
                    self.bad_steps = 0
                    _copy(buffers, good_buffers)
                else:
                    self.bad_steps += 1
                    _copy(good_buffers, buffers)  # what is not finite has gone into BatchNorm's averages too
                    self.position.skipped_steps += 1
                self._optimizer.zero_grad(set_to_none=True)
                self.position.step += 1
                if self.bad_steps == _MOST_BAD_STEPS:
                    raise self._diverged()
                elapsed = time.monotonic() - began
                figures |= {"learning_rate": rate, "gradient_norm": float(norm), "clips_per_s": clips / elapsed,
                            "waiting_share": waited_s / elapsed, "memory_mib": _memory_mib(),
                            "skipped_steps": self.position.skipped_steps}
                last = self.position.step == end
                if last or self.position.step % self.config.evaluate_every == 0:
                    figures |= evaluate()
                self._log(figures, writer)
                bar.update()
                bar.set_postfix(loss=f"{figures['loss']:.3f}", refresh=False)
                if self.bad_steps == 0 and (last or self.position.step % self.config.save_every == 0):
                    self.save()
            if self.bad_steps == 0 and self.last_checkpoint() != self._checkpoint_folder():
                self.save()
        if self.bad_steps and self.last_checkpoint() is None:
            raise self._diverged()

    def _diverged(self) -> AvtrainError:
        return AvtrainError(f"step {self.position.step}: the loss was not finite {self.bad_steps} times in a row; the "
                            f"last good checkpoint is {self.last_checkpoint() or 'none yet'}. Try a lower "
                            "training.learning_rate (in a transfer: transfer.head_rate, transfer.backbone_rate), or "
                            "--precision float32")

    def _supply(self, batches: Batches) -> Iterator[Any]:
        """All batches from the position on; moves the position as they are taken."""
        for batch in batches.starting_at(self.position.epoch, self.position.batch):
            self.position.batch += 1
            if self.position.batch == len(batches):
                self.position.epoch, self.position.batch = self.position.epoch + 1, 0
            yield batch

    def _accumulate(self, step: Step, supply: Iterator[Any],
                    autocast: Callable[[], Any]) -> tuple[dict[str, float], float, int]:
        """Gradients of one optimiser step: (mean figures, seconds spent waiting for data, clips)."""
        parts, waited_s, clips = self.config.accumulate, 0.0, 0
        total: dict[str, float] = {}
        for _ in range(parts):
            asked = time.monotonic()
            batch = next(supply)
            waited_s += time.monotonic() - asked
            with autocast():
                loss, figures = step(batch)
            (loss / parts).backward()
            clips += len(batch.keys)
            for name, value in {"loss": float(loss.detach()), **figures}.items():
                total[name] = total.get(name, 0.0) + value / parts
        return total, waited_s, clips

    def _log(self, figures: dict[str, float], writer: Any) -> None:
        line = {"step": self.position.step, "epoch": self.position.epoch, **figures}
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: round(value, 6) if isinstance(value, float) else value
                                   for name, value in line.items()}) + "\n")
        for name, value in figures.items():
            writer.add_scalar(name, value, self.position.step)

    def save(self) -> Path:
        """Write a checkpoint, whole or not at all, and delete the oldest ones."""
        folder = self._checkpoint_folder()
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        self._save_weights(part)
        with (part / _STATE).open("wb") as file:
            torch.save({"modules": {name: module.state_dict() for name, module in self.modules.items()},
                        "optimizer": self._optimizer.state_dict(), "position": vars(self.position),
                        "generator": self.generator.get_state(), "torch_random": torch.get_rng_state(),
                        "cuda_random": torch.cuda.get_rng_state_all()}, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        for old in self._checkpoints()[:-self.config.keep]:
            shutil.rmtree(old)
        return folder

    def resume(self) -> None:
        """Go back to the last checkpoint: weights, optimiser, position, all random states; later metrics are dropped.

        Raises:
            AvtrainError: there is none, or it is of another model.
        """
        folder = self.last_checkpoint()
        if folder is None:
            raise AvtrainError(f"--resume: no checkpoint in {self.folder / 'checkpoints'}; start without --resume")
        state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
        try:
            for name, module in self.modules.items():
                module.load_state_dict(state["modules"][name])
            self._optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise AvtrainError(f"--resume: {folder} is of a run with other settings: {str(error)[:200]}") from error
        self.position = Position(**state["position"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_random"])
        if state["cuda_random"]:
            torch.cuda.set_rng_state_all(state["cuda_random"])
        if self._metrics.exists():
            lines = [line for line in self._metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= self.position.step]
            with written_whole(self._metrics) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def last_figures(self) -> dict[str, float]:
        """The last line of metrics that holds an evaluation."""
        lines = [json.loads(line) for line in self._metrics.read_text(encoding="utf-8").splitlines()]
        return next((line for line in reversed(lines) if any(name.startswith("test_") for name in line)), {})

    def last_checkpoint(self) -> Path | None:
        """The folder of the newest whole checkpoint."""
        checkpoints = self._checkpoints()
        return checkpoints[-1] if checkpoints else None

    def _checkpoint_folder(self) -> Path:
        return self.folder / "checkpoints" / f"step-{self.position.step:06d}"

    def _checkpoints(self) -> list[Path]:
        folder = self.folder / "checkpoints"
        whole = [path for path in folder.glob("step-*") if path.suffix != ".part" and (path / _STATE).is_file()]
        return sorted(whole, key=lambda path: int(path.name.removeprefix("step-")))


def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    for one, other in zip(source, target, strict=True):
        other.copy_(one)


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The rate of a step (from 0): rises in a line over the warm-up, then falls to 0 along a cosine."""
    warmup = config.warmup * config.steps
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, config.steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def parameter_groups(modules: dict[str, nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """All parameters once, in two groups: with weight decay (matrices, kernels) and without.

    Without: norms and biases, known by their one dimension; and vectors that are tokens or are added to tokens, stacked
    in matrices and known by the last part of their name: bos, modality, positions, mask.
    """
    named = {id(parameter): (name.rpartition(".")[2], parameter) for module in modules.values()
             for name, parameter in module.named_parameters() if parameter.requires_grad}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named.values():
        groups[parameter.dim() > 1 and name not in _TOKEN_VECTORS].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def _memory_mib() -> float:
    """Resident memory of this process."""
    try:
        with open("/proc/self/statm", encoding="utf-8") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
