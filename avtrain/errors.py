"""What can go wrong, in words a user can act on. Errors have fields, and become text where they are printed."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_MOST_LISTED = 20


class AvtrainError(Exception):
    """A problem that ends the command: one line saying what is wrong and what to do."""


@dataclass(frozen=True, order=True)
class Unreadable:
    """A stored clip that can't be decoded, and is left out.

    Attributes:
        shard: where its shard is, for messages.
        key: of the clip.
        reason: what is wrong with it.
    """

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}"


class TooManyUnreadable(AvtrainError):
    """So many clips can't be decoded that it is no accident.

    Args:
        clips: those that were found.
    """

    def __init__(self, clips: Sequence[Unreadable]) -> None:
        super().__init__(clips)
        self.clips = clips

    def __str__(self) -> str:
        listed = "\n  ".join(map(str, sorted(self.clips)[:_MOST_LISTED]))
        return (f"{len(self.clips)} clips can't be decoded, more than 1 % of the data: run `avprep verify` and build "
                f"the shards again.\n  {listed}")


class Elsewhere(AvtrainError):
    """Another process of this run can't go on, and says why itself.

    Args:
        rank: its number.
        reason: a line.
    """

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(rank, reason)
        self.rank, self.reason = rank, reason

    def __str__(self) -> str:
        return f"process {self.rank} can't go on: {self.reason}"


class Stopped(Exception):
    """A run that was told by a signal to stop, and did so with its state saved. No error: it can go on.

    Args:
        number: of the signal.
        step: that the run is at.
        checkpoint: that it goes on from; None: there is none yet.
    """

    def __init__(self, number: int, step: int, checkpoint: Path | None) -> None:
        super().__init__(number, step, checkpoint)
        self.number, self.step, self.checkpoint = number, step, checkpoint

    @property
    def exit_code(self) -> int:
        """As shells have it; 0 for SIGUSR1, by which a scheduler asks politely."""
        return 0 if self.number == signal.SIGUSR1 else 128 + self.number

    def __str__(self) -> str:
        again = f"goes on from {self.checkpoint}" if self.checkpoint else "begins again, for nothing was saved yet"
        return f"stopped by {signal.Signals(self.number).name} at step {self.step}: the same command {again}"


class TaskFailed(AvtrainError):
    """A task that can't be evaluated, where others may be.

    Args:
        task: its name.
        reason: why.
    """

    def __init__(self, task: str, reason: str) -> None:
        super().__init__(task, reason)
        self.task, self.reason = task, reason

    def __str__(self) -> str:
        return f"{self.task}: {self.reason}"


def in_a_line(error: BaseException) -> str:
    """What another library says of a fault: the first line of it, or the fault's kind if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
