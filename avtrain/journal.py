"""Where a run's lines of metrics go: its folder, TensorBoard, and Weights & Biases where that is wanted."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from avtrain import ranks
from avtrain.errors import AvtrainError, in_a_line
from avtrain.run_folder import Line, RunFolder


class Journal:
    """Is open inside the `with` block, on the first process; the others only wait until it is.

    Args:
        folder: of the run.
        step: that it is at; what TensorBoard has from after it is void.
        wandb: the project on Weights & Biases; None: none.

    Raises:
        AvtrainError: W&B can't be had.
    """

    def __init__(self, folder: RunFolder, step: int, wandb: str | None) -> None:
        self._folder, self._step, self._project = folder, step, wandb
        self._events: Any = None
        self._on_wandb: Any = None

    def __enter__(self) -> Journal:
        error: AvtrainError | OSError | None = None
        if ranks.rank() == 0:
            from torch.utils.tensorboard.writer import SummaryWriter  # seconds at first import

            try:
                if self._project is not None:
                    self._on_wandb = _begun(self._project, self._folder)
                self._events = SummaryWriter(str(self._folder.tensorboard), purge_step=self._step + 1)
            except (AvtrainError, OSError) as failed:
                error = failed
        ranks.agree(error)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self._events is not None:
            self._events.close()
        if self._on_wandb is not None:
            self._on_wandb.finish(exit_code=0 if error is None else 1)

    def add(self, step: int, figures: Line) -> None:
        """Log what was found at a step."""
        self._folder.log({"step": step, **figures})
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)
        if self._on_wandb is not None:
            self._on_wandb.log({"step": step, **figures})


def _begun(project: str, folder: RunFolder) -> Any:
    """The run on W&B that goes with the folder; what is logged again after going on takes the same places there."""
    import wandb

    try:
        run = wandb.init(project=project, id=folder.wandb_id(), name="/".join(folder.path.resolve().parts[-2:]),
                         resume="allow", dir=str(folder.path), settings=wandb.Settings(console="off"))
        run.define_metric("*", step_metric="step")
    except wandb.Error as error:
        raise AvtrainError(f"--wandb {project}: {in_a_line(error)}; WANDB_MODE=offline keeps it here, for `wandb sync`"
                           ) from error
    return run
