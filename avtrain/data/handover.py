"""Batches from worker processes to this one, through shared memory. None is lost in silence: a loss would be waited for
without end.

torch's loader hands batches over in a thread of the worker, which prints what goes wrong there and drops the batch.
Here a batch is put into shared memory where the worker makes it, and what goes wrong is an error like any other.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils.data import DataLoader

from avtrain.errors import AvtrainError

AHEAD = 2  # batches that each worker makes ahead
_PATIENCE_S = 5  # for a process that ends
_SHARED_MEMORY = "/dev/shm"
_WITHOUT = "or make them without workers: --set data.workers=0"
_MORE_ROOM = f"give it more (docker run --shm-size=2g, or --ipc=host), {_WITHOUT}"


def in_flight_bytes(batch_bytes: int, workers: int) -> int:
    """Shared memory that a loader can hold: what its workers have made ahead, and the batch in use."""
    return (AHEAD * workers + 1) * batch_bytes if workers else 0


def check_room(wanted_bytes: int) -> None:
    """Raise AvtrainError where there is less shared memory than that; rather now than in the middle of a run."""
    try:
        found = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return  # not on this system
    free_bytes = found.f_bavail * found.f_frsize
    if free_bytes < wanted_bytes:
        raise AvtrainError(f"{_SHARED_MEMORY} has {free_bytes / 2**20:.0f} MiB free, and the batches that workers make "
                           f"ahead can take {wanted_bytes / 2**20:.0f} MiB: {_MORE_ROOM}")


def begin(worker: int) -> None:
    """The start of a worker process."""
    torch.set_num_threads(1)
    # A worker that is told to end unwinds first: an unfinished download leaves nothing behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def packed(collate: Callable[[Any], Any], items: Any) -> bytes:
    """In the worker: the batch in shared memory, and where it is.

    Raises:
        AvtrainError: there is no room for it.
    """
    batch = collate(items)
    try:
        return bytes(ForkingPickler.dumps(batch))
    except (OSError, RuntimeError) as error:
        raise _not_handed_over(error) from error


def unpacked(loader: DataLoader[Any]) -> Iterator[Any]:
    """In the main process: the batches of a loader that packs them.

    Raises:
        AvtrainError: a worker could not be started, was ended, or its batch can't be had.
    """
    before = set(multiprocessing.active_children())
    try:
        supply = _started(loader)
    except OSError as error:
        raise AvtrainError(f"workers can't be started: {error.strerror or error}; is {_SHARED_MEMORY} full? Then "
                           f"{_MORE_ROOM}") from error
    workers = set(multiprocessing.active_children()) - before
    try:
        while (content := _next(supply, workers)) is not None:
            yield _taken(content, workers)
    finally:
        for worker in workers:
            worker.terminate()
        # Now, not when the last traceback that holds the loader is collected. torch has no public name for it.
        supply._shutdown_workers()
        for worker in workers:
            worker.kill()


def _next(supply: Iterator[Any], workers: set[BaseProcess]) -> bytes | None:
    try:
        content: bytes | None = next(supply, None)
        return content
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker (pid"):
            raise _ended(workers) from error
        raise


def _taken(content: bytes, workers: set[BaseProcess]) -> Any:
    try:
        return pickle.loads(content)  # from a process of our own
    except (OSError, EOFError, RuntimeError) as error:
        if isinstance(error, ConnectionError | FileNotFoundError | EOFError):  # is it there no more?
            ended = wait([worker.sentinel for worker in workers], _PATIENCE_S)
            for worker in workers:
                worker.join(_PATIENCE_S if worker.sentinel in ended else 0)
        raise (_ended(workers) if any(worker.exitcode for worker in workers) else _not_handed_over(error)) from error


def _started(loader: DataLoader[Any]) -> Any:
    """The loader's iterator. Where a worker ends too early is found out when its batch is awaited, within 5 seconds.

    torch's own handler of SIGCHLD would raise wherever the main thread is at that moment, in the middle of a step or of
    writing a checkpoint.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    supply = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return supply


def _not_handed_over(error: Exception) -> AvtrainError:
    if "Too many open files" in str(error) or "ancdata" in str(error):
        return AvtrainError("a worker can't hand its batch over: too many open files; raise the limit (ulimit -n), "
                            f"{_WITHOUT}")
    return AvtrainError(f"a worker can't hand its batch over through {_SHARED_MEMORY}: {error}; {_MORE_ROOM}")


def _ended(workers: set[BaseProcess]) -> AvtrainError:
    codes = {worker.exitcode for worker in workers if worker.exitcode}
    if -signal.SIGBUS in codes:
        return AvtrainError(f"a worker was ended by SIGBUS, as when {_SHARED_MEMORY} is full: {_MORE_ROOM}")
    if -signal.SIGKILL in codes:
        return AvtrainError("a worker was killed, as the system does when memory runs out: lower data.workers or "
                            "training.batch_size")
    names = ", ".join(signal.Signals(-code).name if code < 0 else f"exit code {code}" for code in codes)
    return AvtrainError(f"a worker ended too early ({names or 'unknown why'}): with --set data.workers=0 the reason "
                        "shows")
