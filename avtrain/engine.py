"""The one training loop. It knows neither model nor data: it is handed a step, batches and what to save."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from avtrain import ranks
from avtrain.config import TrainingConfig
from avtrain.errors import AvtrainError, Stopped
from avtrain.finite_steps import FiniteSteps, LossScale
from avtrain.journal import Journal
from avtrain.progress import bar_options
from avtrain.run_folder import Line, RunFolder
from avtrain.saved_state import NotSaved
from avtrain.speed import Span
from avtrain.stopping import Interrupted, Stopping, Took

_MOST_BAD_STEPS = 10
_LOG = logging.getLogger(__name__)


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
Evaluate = Callable[[], dict[str, float]]


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
        scaled: losses are scaled, as float16 needs it.
        mfu_of_clip_per_s: the share of the device's arithmetic that one clip a second takes, where that is known.
        wandb: the project on Weights & Biases that gets its metrics too; None: none.

    Raises:
        ValueError: the optimiser is not a fused one.
    """

    def __init__(self, folder: RunFolder, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer,
                 config: TrainingConfig, save_weights: Callable[[Path], None], scaled: bool = False,
                 mfu_of_clip_per_s: float | None = None, wandb: str | None = None) -> None:
        if not all(group.get("fused") for group in optimizer.param_groups):
            raise ValueError("a fused optimiser is wanted: others would take steps that are not finite")
        self.folder, self.modules, self.config = folder, modules, config
        self.position = Position()
        self.bad_steps = 0  # the last ones, in a row, that were not finite
        self._optimizer, self._save_weights = optimizer, save_weights
        self._mfu_of_clip_per_s, self._wandb = mfu_of_clip_per_s, wandb
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._scale = LossScale(self._parameters[0].device) if scaled else None
        self._data: dict[str, Any] = {}  # what the position's clips are counted in
        self._took = Took("save", "evaluation")
        self._saved_at = time.monotonic()
        self._late = False  # a checkpoint that waits for a finite step
        self._not_saved: NotSaved | None = None

    def train(self, step: Step, batches: Batches, autocast: Callable[[], Any], evaluate: Evaluate | None,
              max_steps: int | None = None, until: float | None = None) -> None:
        """Train until the schedule's end, `max_steps`, or so that all is done at `until` (of `time.monotonic`); saves
        and evaluates at the end. An evaluation that the last checkpoint lacks is made up first. Of several processes
        the first one saves and evaluates.

        Nothing is done where the run is there already.

        Raises:
            Stopped: a signal came; a checkpoint was written after the step under way, or before it where it still
                waited for data.
            AvtrainError: the loss was not finite ten times in a row, or at the end, without a checkpoint from before;
                the last checkpoint can't be written; or of the data of any process, after a checkpoint.
        """
        end, due = last_step(self.config, max_steps), ranks.by_first(self.folder.due)
        if self.position.step >= end and due is None:
            return
        if self.position.step == 0 and ranks.rank() == 0:
            self.folder.begin()
        self.bad_steps, self._saved_at = 0, time.monotonic()
        if evaluate is None:
            self._took.last["evaluation"] = 0.0
        finite = FiniteSteps(list(self.modules.values()), self._parameters[0].device)
        with (Stopping(until) as stop, closing(stop.supply(batches.starting_at(self.position.clips))) as supply,
              Journal(self.folder, self.position.step, self._wandb) as journal,
              tqdm(initial=self.position.step, total=end, desc="train", unit="step", **bar_options()) as bar):
            if due is not None:
                self._log_evaluated(due, evaluate, stop, journal)
            try:
                self._train(step, supply, batches, autocast, evaluate, finite, stop, end, journal, bar)
            except Interrupted:
                pass  # the step is undone
            self._read(finite)
            if self.folder.last_step() != self.position.step:
                self._save()
        ranks.agree(self._not_saved)
        if stop.asked is not None:
            raise Stopped(stop.asked, self.position.step, self.folder.last_checkpoint())
        if self.bad_steps and self.folder.last_checkpoint() is None:
            raise self._diverged()

    def _train(self, step: Step, supply: Iterator[Any], batches: Batches, autocast: Callable[[], Any],
               evaluate: Evaluate | None, finite: FiniteSteps, stop: Stopping, end: int, journal: Journal,
               bar: Any) -> None:
        """The loop."""
        first, span, ends = ranks.rank() == 0, Span(), stop.is_time(self._took)
        while self.position.step < end and not ends and not stop.all_stop():
            with self._took.step():
                rate, figures, norm = self._step(step, supply, batches, autocast, span, finite)
            bar.update()
            ends = self.position.step == end or stop.is_time(self._took)
            intervals = (self.config.log_every, self.config.evaluate_every, self.config.save_every)
            logs, evaluates, saves = (ends or self.position.step % interval == 0 for interval in intervals)
            # Not by the clocks of the others, which would go other ways.
            saves = first and (saves or evaluates and evaluate is not None or self._late or self._is_long_ago())
            if not (logs or evaluates or saves):
                continue  # the device isn't waited for
            self._read(finite)
            if self.bad_steps >= _MOST_BAD_STEPS:
                raise self._diverged()
            line: Line = {}
            if logs or evaluates:
                line = {name: float(value) for name, value in figures.items()}
                line |= {"epoch": self.position.clips // len(batches), "learning_rate": rate,
                         "gradient_norm": float(norm), "skipped_steps": self.position.skipped_steps,
                         **span.figures(norm.device, self._mfu_of_clip_per_s)}
                bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
            self._late = saves and self.bad_steps > 0 and not ends
            # A line is there before its checkpoint, or is kept in it until its evaluation is done.
            if logs and not evaluates and first:
                journal.add(self.position.step, line)
            if saves and not self._late:
                self._save(line if evaluates else None)
            if evaluates:
                self._log_evaluated(line, evaluate, stop, journal)
            if line:
                span = Span()

    def _step(self, step: Step, supply: Iterator[Any], batches: Batches, autocast: Callable[[], Any], span: Span,
              finite: FiniteSteps) -> tuple[float, dict[str, Tensor], Tensor]:
        """One optimiser step: (learning rate, figures, gradient's norm). Without all of its data nothing is changed.

        Raises:
            Interrupted: a signal came while data were waited for.
            AvtrainError, OSError: of the data of any process, after a checkpoint.
        """
        random = _random_states(self._parameters[0].device)
        rate = learning_rate(self.position.step, self.config)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("rate_scale", 1.0)
        try:
            figures = self._accumulate(step, supply, batches.parts, autocast, span)
        except (Interrupted, AvtrainError, OSError) as error:
            _set_random_states(self._parameters[0].device, *random)
            finite.take_back()
            self._optimizer.zero_grad(set_to_none=not self.config.cuda_graphs)
            if not isinstance(error, Interrupted | ranks.Gone):
                self._read(finite)
                if self.bad_steps == 0 and self.folder.last_step() != self.position.step:
                    self._save()
                with suppress(ranks.Gone):
                    ranks.agree()  # the end of one is that of all, and it is still being saved
            raise
        if self._scale:
            self._scale.unscale(self._parameters)
        norm = nn.utils.clip_grad_norm_(self._parameters, self.config.clip_norm or math.inf)
        self._optimizer.found_inf = finite.after(figures["loss"], norm)  # type: ignore[attr-defined]
        self._optimizer.step()
        if self._scale:
            self._scale.after(norm)
        self._optimizer.zero_grad(set_to_none=not self.config.cuda_graphs)
        self.position.step += 1
        self.position.clips += batches.batch_size
        return rate, figures, norm

    def _log_evaluated(self, line: Line, evaluate: Evaluate | None, stop: Stopping, journal: Journal) -> None:
        """Log a line, with the figures on held-out clips; none where a signal comes meanwhile: the last checkpoint
        knows that it is due. The others wait for the first process."""
        error: AvtrainError | OSError | None = None
        try:
            if ranks.rank() == 0:
                if evaluate is not None:
                    with stop.interruptible(), self._took.measured("evaluation"):
                        line = line | evaluate()
                    line |= {"evaluation_s": self._took.last["evaluation"]}
                journal.add(self.position.step, line)
        except Interrupted:
            pass
        except (AvtrainError, OSError) as failed:
            error = failed
        ranks.agree(error)

    def _is_long_ago(self) -> bool:
        """Whether it is time for a checkpoint."""
        return 0 < 60 * self.config.save_minutes <= time.monotonic() - self._saved_at

    def _save(self, due: Line | None = None) -> None:
        """Write a checkpoint, if any step was finite; where it can't be written, say so: the next one may be."""
        self._saved_at = time.monotonic()
        if self.position.skipped_steps >= self.position.step:
            return
        try:
            with self._took.measured("save"):
                self.save(due)
            self._not_saved = None
        except NotSaved as error:
            self._not_saved = error
            _LOG.warning("step %d: %s; it is tried again with the next checkpoint", self.position.step, error)

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
                    span: Span) -> dict[str, Tensor]:
        """Gradients of one optimiser step, from all its parts; figures of the whole batch."""
        total: dict[str, Tensor] = {}
        for part in range(parts):
            batch = _next_of_all(supply, span)
            with autocast():
                loss, figures = step(batch, part)
            # Averaged over the processes, where their shares are to be added up.
            ((self._scale.scaled(loss) if self._scale else loss) * ranks.ranks()).backward()
            for name, value in {"loss": loss.detach(), **figures}.items():
                total[name] = total[name] + value if name in total else value
        of_all = ranks.summed(torch.stack([value.detach() for value in total.values()]))
        return dict(zip(total, of_all, strict=True))

    def save(self, due: Line | None = None) -> None:
        """Write a checkpoint, whole or not at all, and delete the oldest ones; the first process does.

        Args:
            due: the line of metrics of this step that still lacks its evaluation.

        Raises:
            NotSaved: it can't be written.
        """
        if ranks.rank():
            return
        state = {"modules": {name: module.state_dict() for name, module in self.modules.items()},
                 "optimizer": self._optimizer.state_dict(), "position": vars(self.position), "data": self._data,
                 "torch_random": torch.get_rng_state(), "cuda_random": torch.cuda.get_rng_state_all(),
                 "save_s": self._took.last["save"]}
        if self._scale:
            state["loss_scale"] = self._scale.state()
        due = None if due is None else {"step": self.position.step, **due}
        self.folder.save(self.position.step, state, self._save_weights, self.config.keep, due)

    def go_on(self, batches: Batches, data: str = "", data_before: str = "") -> bool:
        """Go back to the last checkpoint: weights, optimiser, position, all random states; later metrics are dropped.

        Args:
            batches: that the run goes on with.
            data: their fingerprint. If the checkpoint's is another one, an epoch begins.
            data_before: what that was, if the checkpoint does not say so itself.

        Returns:
            Whether there was one.

        Raises:
            AvtrainError: it is of another model; or all are damaged.
        """
        self._data = {"fingerprint": data, "clips": len(batches)}
        state = self.folder.load(set_aside=ranks.rank() == 0)
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
        before = state.get("data") or {"fingerprint": data_before or data, "clips": len(batches)}
        if before["fingerprint"] != data:
            self.position.clips = -(-self.position.clips // before["clips"]) * len(batches)
        if self._scale and "loss_scale" in state:
            self._scale.load(state["loss_scale"])
        lasted = (line["evaluation_s"] for line in reversed(self.folder.lines()) if "evaluation_s" in line)
        self._took.last = {"save": state.get("save_s"), "evaluation": next(lasted, None)}
        torch.set_rng_state(state["torch_random"])
        if state["cuda_random"]:
            torch.cuda.set_rng_state_all(state["cuda_random"])
        if ranks.rank() == 0:
            self.folder.drop_lines_after(self.position.step)
        return True


def _next_of_all(supply: Iterator[Any], span: Span) -> Any:
    """The next part of the data, once all processes have theirs: who had none would be waited for without end.

    Raises:
        AvtrainError, OSError: one of them can't have it.
    """
    asked, batch = time.monotonic(), None
    error: AvtrainError | OSError | None = None
    try:
        batch = next(supply)
        span.took(time.monotonic() - asked, len(batch.keys))
    except (AvtrainError, OSError) as failed:
        error = failed
    ranks.agree(error)
    return batch


def _random_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_states(device: torch.device, of_torch: Tensor, of_cuda: Tensor | None) -> None:
    torch.set_rng_state(of_torch)
    if of_cuda is not None:
        torch.cuda.set_rng_state(of_cuda, device)


def _position_of(saved: dict[str, int], batches: Batches) -> Position:
    """As it was saved; earlier versions counted the parts of each epoch, of which the last could be smaller."""
    if "batch" not in saved:
        return Position(**saved)
    size = batches.batch_size // batches.parts
    clips = saved["epoch"] * len(batches) + min(len(batches), saved["batch"] * size)
    return Position(saved["step"], clips, saved["skipped_steps"])


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
