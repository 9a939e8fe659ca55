"""What can go wrong, in words a user can act on."""

from __future__ import annotations

from enum import Enum


class AvprepError(Exception):
    """A problem that ends the command: one line saying what is wrong and what to do."""


class NothingToBuild(AvprepError):
    """A split without a single file to try; other splits may have some."""


class DiskFull(AvprepError):
    """There is no room for what is being written."""

    def __str__(self) -> str:
        return "the disk is full: free some space and run the same command again to go on"


class Reason(str, Enum):
    """Why one source could not be written. The value stands in `failures.jsonl` and in the summary."""

    UNOPENED = "can't be opened"
    NOT_A_FILE = "not a regular file"
    EMPTY = "empty file"
    UNREADABLE = "not a readable media file"
    NO_STREAMS = "neither picture nor sound"
    NO_LENGTH = "zero length"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt stream"
    UNTIMED = "nothing tells the time"
    NOT_FINITE = "values that are not finite"
    TOO_LARGE = "too large"
    TIMEOUT = "time-out"
    CRASHED = "ffmpeg was killed"


class SourceFailed(Exception):
    """One source, or one clip of it, can't be used; the run goes on.

    Args:
        stage: "probe" or "decode".
        reason: the kind of failure.
        detail: one line with the particulars.
    """

    def __init__(self, stage: str, reason: Reason, detail: str = "") -> None:
        super().__init__(stage, reason, detail)
        self.stage = stage
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason.value}" + (f" ({self.detail})" if self.detail else "")
