"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what is written there takes its place if the block ends well, else vanishes.

    Raises:
        OSError: it can't be written; names `path`, not the temporary name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if str(error.filename) == str(temporary) or error.filename is None and error.errno in _FULL:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


_FULL = (errno.ENOSPC, errno.EDQUOT)  # what a write says names no file


@contextmanager
def written_as_it_comes(path: Path) -> Iterator[BinaryIO]:
    """An open file that takes the place of `path` if the block ends well; for what takes long and is large.

    It is locked while it is written, and so is told from what a killed process has left, which `remove_leftovers`
    removes.

    Raises:
        OSError: as `written_whole`.
    """
    remove_leftovers(path)
    with written_whole(path) as temporary, temporary.open("wb+") as file:
        _locked(file)
        yield file


def remove_leftovers(path: Path) -> int:
    """Remove what killed processes have left of this file when they wrote it as it came; returns how many parts."""
    removed = 0
    for part in path.parent.glob(f".{path.name}.*{path.suffix}"):
        try:
            with part.open("rb+") as file:
                if _locked(file):
                    part.unlink()
                    removed += 1
        except FileNotFoundError:  # whoever wrote it has just finished
            continue
    return removed


def _locked(file: BinaryIO) -> bool:
    """Whether this process has the file's lock now; no where another one has it, or the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
