"""The one training loop. It knows neither model nor data: it is handed a step, batches and what to save."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from avtrain import ranks
from avtrain.config import TrainingConfig
from avtrain.errors import AvtrainError
from avtrain.progress import bar_options
from avtrain.run_folder import RunFolder

_MOST_BAD_STEPS = 10


class Batches(Protocol):
    """What the loop needs of the data."""

    @property
    def batch_size(self) -> int:
        """Clips of a step, of all processes."""

    @property
    def parts(self) -> int:
        """That a process takes its share of them in."""

    def __len__(self) -> int:
        """Clips, or views of them, of an epoch."""

    def starting_at(self, first: int) -> Iterator[Any]:
        """This process's parts of the batches from that clip on, over the epochs and without end, the same every
        time."""


# (part of a batch, its number) -> (its share of the loss; of the figures to log, scalars on the device): the shares of
# all parts and processes add up. Called with gradients on, inside autocast.
Step = Callable[[Any, int], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class Position:
    """How far the run is: optimiser steps, and clips of the data, counted over its epochs."""

    step: int = 0
    clips: int = 0
    skipped_steps: int = 0


class Run:
    """A training run: `folder` gets its metrics, checkpoints and TensorBoard events.

    Args:
        folder: of the run.
        modules: by name; their weights are saved in checkpoints and trained.
        optimizer: of their parameters, a fused one, which can skip a step by itself; a group with a `rate_scale` gets
            that share of the learning rate.
        config: schedule, intervals, clipping.
        save_weights: writes what others use of a checkpoint (the model's own file) into its folder.

    Raises:
        ValueError: the optimiser is not a fused one.
    """

    def __init__(self, folder: RunFolder, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer,
                 config: TrainingConfig, save_weights: Callable[[Path], None]) -> None:
        if not all(group.get("fused") for group in optimizer.param_groups):
            raise ValueError("a fused optimiser is wanted: others would take steps that are not finite")
        self.folder, self.modules, self.config = folder, modules, config
        self.position = Position()
        self.bad_steps = 0  # the last ones, in a row, that were not finite
        self._optimizer, self._save_weights = optimizer, save_weights

    def train(self, step: Step, batches: Batches, autocast: Callable[[], Any],
              evaluate: Callable[[], dict[str, float]], max_steps: int | None = None,
              max_time_s: float | None = None) -> None:
        """Train until the schedule's end, `max_steps`, or `max_time_s` of this call; evaluates and saves at the end.

        Nothing is done where the run is there already.

        Raises:
            AvtrainError: the loss was not finite ten times in a row, or at the end, without a
                checkpoint from before.
        """
        from torch.utils.tensorboard.writer import SummaryWriter  # seconds at first import

        end = last_step(self.config, max_steps)
        if self.position.step >= end:
            return
        first = ranks.rank() == 0  # it alone writes
        if self.position.step == 0 and first:
            self.folder.begin()
        started, self.bad_steps = time.monotonic(), 0
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        finite = FiniteSteps(list(self.modules.values()), parameters[0].device)
        supply, span = batches.starting_at(self.position.clips), _Span()
        with (SummaryWriter(str(self.folder.tensorboard), purge_step=self.position.step + 1) if first
              else nullcontext() as writer,
              tqdm(initial=self.position.step, total=end, desc="train", unit="step", **bar_options()) as bar):
            while self.position.step < end and not (max_time_s and time.monotonic() - started >= max_time_s):
                rate = learning_rate(self.position.step, self.config)
                for group in self._optimizer.param_groups:
                    group["lr"] = rate * group.get("rate_scale", 1.0)
                figures = self._accumulate(step, supply, batches.parts, autocast, span)
                norm = nn.utils.clip_grad_norm_(parameters, self.config.clip_norm or math.inf)
                self._optimizer.found_inf = finite.after(figures["loss"], norm)  # type: ignore[attr-defined]
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=not self.config.cuda_graphs)
                self.position.step += 1
                self.position.clips += batches.batch_size
                bar.update()
                intervals = (self.config.log_every, self.config.evaluate_every, self.config.save_every)
                logs, evaluates, saves = (self.position.step == end or self.position.step % interval == 0
                                          for interval in intervals)
                if not (logs or evaluates or saves):
                    continue  # the device isn't waited for
                self._read(finite)
                if self.bad_steps >= _MOST_BAD_STEPS:
                    raise self._diverged()
                if logs or evaluates:
                    line = {name: float(value) for name, value in figures.items()}
                    line |= {"epoch": self.position.clips // len(batches), "learning_rate": rate,
                             "gradient_norm": float(norm), **span.figures(), "memory_mib": _memory_mib(),
                             "skipped_steps": self.position.skipped_steps}
                    if first:
                        self._log(line | (evaluate() if evaluates else {}), writer)
                    bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
                    span = _Span()
                if saves and self.bad_steps == 0:
                    self.save()
            self._read(finite)
            if self.bad_steps == 0 and self.folder.last_step() != self.position.step:
                self.save()
        if self.bad_steps and self.folder.last_checkpoint() is None:
            raise self._diverged()

    def _read(self, steps: FiniteSteps) -> None:
        """Learn from the device how many steps were not finite."""
        self.bad_steps, skipped = steps.read()
        self.position.skipped_steps += skipped

    def _diverged(self) -> AvtrainError:
        return AvtrainError(f"step {self.position.step}: the loss was not finite {self.bad_steps} times in a row; the "
                            f"last good checkpoint is {self.folder.last_checkpoint() or 'none yet'}. Try a lower "
                            "training.learning_rate (in a transfer: transfer.head_rate, transfer.backbone_rate), or "
                            "--precision float32")

    def _accumulate(self, step: Step, supply: Iterator[Any], parts: int, autocast: Callable[[], Any],
                    span: _Span) -> dict[str, Tensor]:
        """Gradients of one optimiser step, from all its parts; figures of the whole batch."""
        total: dict[str, Tensor] = {}
        for part in range(parts):
            asked = time.monotonic()
            batch = next(supply)
            span.took(time.monotonic() - asked, len(batch.keys))
            with autocast():
                loss, figures = step(batch, part)
            # Averaged over the processes, where their shares are to be added up.
            (loss * ranks.ranks()).backward()
            for name, value in {"loss": loss.detach(), **figures}.items():
                total[name] = total[name] + value if name in total else value
        of_all = ranks.summed(torch.stack([value.detach() for value in total.values()]))
        return dict(zip(total, of_all, strict=True))

    def _log(self, figures: dict[str, float], writer: Any) -> None:
        self.folder.log({"step": self.position.step, **figures})
        for name, value in figures.items():
            writer.add_scalar(name, value, self.position.step)

    def save(self) -> None:
        """Write a checkpoint, whole or not at all, and delete the oldest ones; the first process does."""
        if ranks.rank():
            return
        state = {"modules": {name: module.state_dict() for name, module in self.modules.items()},
                 "optimizer": self._optimizer.state_dict(), "position": vars(self.position),
                 "torch_random": torch.get_rng_state(), "cuda_random": torch.cuda.get_rng_state_all()}
        self.folder.save(self.position.step, state, self._save_weights, self.config.keep)

    def go_on(self, batches: Batches) -> bool:
        """Go back to the last checkpoint: weights, optimiser, position, all random states; later metrics are dropped.

        Args:
            batches: that the run goes on with.

        Returns:
            Whether there was one.

        Raises:
            AvtrainError: it is of another model, or damaged.
        """
        state = self.folder.load()
        if state is None:
            return False
        try:
            for name, module in self.modules.items():
                module.load_state_dict(state["modules"][name])
            for group in state["optimizer"]["param_groups"]:
                group["fused"] = True  # earlier versions wrote down that theirs was not, and it would be no more
            self._optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise AvtrainError(f"{self.folder.last_checkpoint()} is of a run with other settings: {reason}; --force "
                               "begins anew") from error
        self.position = _position_of(state["position"], batches)
        torch.set_rng_state(state["torch_random"])
        if state["cuda_random"]:
            torch.cuda.set_rng_state_all(state["cuda_random"])
        if ranks.rank() == 0:
            self.folder.drop_lines_after(self.position.step)
        return True


def _position_of(saved: dict[str, int], batches: Batches) -> Position:
    """As it was saved; earlier versions counted the parts of each epoch, of which the last could be smaller."""
    if "batch" not in saved:
        return Position(**saved)
    size = batches.batch_size // batches.parts
    clips = saved["epoch"] * len(batches) + min(len(batches), saved["batch"] * size)
    return Position(saved["step"], clips, saved["skipped_steps"])


class FiniteSteps:
    """What the device knows of the steps: whether they were finite, and the buffers as of the last that was.

    Only `read` waits for the device. What is not finite goes into BatchNorm's averages too, and would stay there.

    Args:
        modules: whose buffers are kept.
        device: of the loss.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        self._in_a_row, self._skipped = torch.zeros((), device=device), torch.zeros((), device=device)
        of_type: dict[torch.dtype, list[Tensor]] = {}
        for buffer in (buffer for module in modules for buffer in module.buffers()):
            of_type.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = [(buffers, _joined(buffers)) for buffers in of_type.values()]

    @torch.no_grad()
    def after(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Count the step; where it was not finite, take the buffers back. 1 if it is to be skipped, else 0: where it
        was not finite, or where no gradient came, as of clips that can't be read."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        for buffers, good in self._buffers:
            good.copy_(torch.where(bad, good, _joined(buffers)))
            parts = good.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view_as(one) for part, one in zip(parts, buffers, strict=True)])
        self._in_a_row = (self._in_a_row + 1) * bad
        skipped = bad | (norm == 0)
        self._skipped = self._skipped + skipped
        return skipped.float()

    def read(self) -> tuple[int, int]:
        """(the last steps in a row that were not finite, all that were skipped since it was read before)."""
        found = int(self._in_a_row), int(self._skipped)
        self._skipped = torch.zeros_like(self._skipped)
        return found


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


class _Span:
    """Time and clips since the last line of metrics."""

    def __init__(self) -> None:
        self._began, self._waited_s, self._clips = time.monotonic(), 0.0, 0

    def took(self, waited_s: float, clips: int) -> None:
        """A batch came."""
        self._waited_s, self._clips = self._waited_s + waited_s, self._clips + clips

    def figures(self) -> dict[str, float]:
        """Clips a second, and the share of the time that was spent waiting for data."""
        elapsed_s = time.monotonic() - self._began
        return {"clips_per_s": self._clips / elapsed_s, "waiting_share": self._waited_s / elapsed_s}


def last_step(config: TrainingConfig, max_steps: int | None) -> int:
    """Where a call ends: at the schedule's end, or before."""
    return min(config.steps, max_steps or config.steps)


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The rate of a step (from 0): rises in a line over the warm-up, then falls to 0 along a cosine."""
    warmup = config.warmup * config.steps
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, config.steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _memory_mib() -> float:
    """Resident memory of this process."""
    try:
        with open("/proc/self/statm", encoding="utf-8") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
