"""One checkpoint's folder: the state of a run, what others use of it, and a list by which damage is found out."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from avtrain.errors import AvtrainError, in_a_line

_STATE = "training.pt"
_LIST = "checkpoint.json"  # size and checksum of each file, and the line of metrics that is due; earlier versions: none
_AT_ONCE = 2**24  # bytes
# What torch.load raises, according to where a file is damaged.
_UNREADABLE = (RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError, pickle.UnpicklingError)


class Damaged(Exception):
    """A checkpoint that can't be read; says why."""


class NotSaved(AvtrainError):
    """A checkpoint that could not be written.

    Args:
        folder: where it should be.
        reason: what the system says.
        wanted_bytes: room that it needs.
        free_bytes: room that there was.
    """

    def __init__(self, folder: Path, reason: str, wanted_bytes: int, free_bytes: int) -> None:
        super().__init__(folder, reason, wanted_bytes, free_bytes)
        self.folder, self.reason, self.wanted_bytes, self.free_bytes = folder, reason, wanted_bytes, free_bytes

    def __str__(self) -> str:
        return (f"no checkpoint can be written to {self.folder.parent}: {self.reason}; it needs "
                f"{self.wanted_bytes / 2**20:.1f} MiB, and {self.free_bytes / 2**20:.1f} MiB are free")


def write_checkpoint(part: Path, state: Mapping[str, Any], save_weights: Callable[[Path], None],
                     due: Mapping[str, Any] | None) -> None:
    """Fill a new folder.

    Args:
        part: the folder; what is in it is on the disk when this returns.
        state: what `read_state` gives back.
        save_weights: writes more files into it.
        due: what `due_of` gives back.

    Raises:
        NotSaved: it can't be written; some of it may be there.
    """
    wanted_bytes = _tensor_bytes(state) + _tensor_bytes(state.get("modules"))  # weights also by themselves
    free_bytes = 0
    try:
        part.mkdir(parents=True)
        free_bytes = shutil.disk_usage(part).free
        if free_bytes < wanted_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_weights(part)
        _write_state(part / _STATE, state)
        files = {path.name: [path.stat().st_size, _checksum(path)] for path in part.iterdir()}
        with (part / _LIST).open("w", encoding="utf-8") as file:
            json.dump({"files": files, "due": due}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or in_a_line(error)
        raise NotSaved(part, reason, wanted_bytes, free_bytes) from error


def read_state(folder: Path) -> dict[str, Any]:
    """What was written, on the CPU.

    Raises:
        Damaged: it is not what was written.
        OSError: it can't be read at the moment.
    """
    for name, (size, checksum) in _files_of(folder).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or _checksum(path) != checksum:
            raise Damaged(f"{name} is {'not what was written' if path.is_file() else 'missing'}")
    try:
        state: dict[str, Any] = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise Damaged(f"{_STATE} is missing") from error
    except _UNREADABLE as error:
        raise Damaged(f"{_STATE} is not what was written") from error
    return state


def has_all(folder: Path) -> bool:
    """Whether all files are there, in full length; at no cost."""
    try:
        files = _files_of(folder)
    except Damaged:
        return False
    return (folder / _STATE).is_file() and all((folder / name).is_file() and (folder / name).stat().st_size == size
                                               for name, (size, _) in files.items())


def due_of(folder: Path) -> dict[str, Any] | None:
    """The line of metrics that lacked its evaluation when this was written.

    Raises:
        Damaged: that can't be read.
    """
    due: dict[str, Any] | None = _listed(folder)["due"]
    return due


def _files_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {name: (size, checksum) for name, (size, checksum) in _listed(folder)["files"].items()}


def _listed(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _LIST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"files": {}, "due": None}  # of an earlier version
    except ValueError as error:
        raise Damaged(f"{_LIST} is not what was written") from error
    if not isinstance(found, dict) or not found.keys() >= {"files", "due"}:
        raise Damaged(f"{_LIST} is not what was written")
    return found


def _write_state(path: Path, state: Mapping[str, Any]) -> None:
    with path.open("wb") as file:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:  # torch's own, where the file would not take more
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        file.flush()
        os.fsync(file.fileno())


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while content := file.read(_AT_ONCE):
            checksum = zlib.crc32(content, checksum)
    return checksum


def _tensor_bytes(state: Any) -> int:
    """Of all tensors in nested dictionaries and lists."""
    if isinstance(state, Tensor):
        return state.nbytes
    inside: Iterable[Any] = state.values() if isinstance(state, Mapping) else state if isinstance(state, list) else ()
    return sum(map(_tensor_bytes, inside))
