"""Batches from worker processes to this one, through shared memory. None is lost in silence: a loss would be waited for
without end.

torch's loader hands batches over in a thread of the worker, which prints what goes wrong there and drops the batch.
Here a batch is put into shared memory where the worker makes it, and what goes wrong is an error like any other, which
comes to this process as it was raised; torch would make a text of it.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from avtrain.errors import AvtrainError, in_a_line

AHEAD = 2  # batches that each worker makes ahead
_PATIENCE_S = 5  # for a process that ends
_SHARED_MEMORY = "/dev/shm"
_WITHOUT = "or make them without workers: --set data.workers=0"
_MORE_ROOM = f"give it more (docker run --shm-size=2g, or --ipc=host), {_WITHOUT}"
# How torch, and Python where it hands over files, begin or put what has no class of its own.
_WORKER_ENDED = "DataLoader worker (pid"
_TOO_MANY_FILES = ("Too many open files", "ancdata")


class WorkerEnded(AvtrainError):
    """A worker process ended before its batch came.

    Args:
        codes: how it ended, as `multiprocessing` has it: below zero the number of a signal; of all that ended so.
    """

    def __init__(self, codes: frozenset[int]) -> None:
        super().__init__(codes)
        self.codes = codes

    def __str__(self) -> str:
        if -signal.SIGBUS in self.codes:
            return f"a worker was ended by SIGBUS, as when {_SHARED_MEMORY} is full: {_MORE_ROOM}"
        if -signal.SIGKILL in self.codes:
            return ("a worker was killed, as the system does when memory runs out: lower data.workers or "
                    "training.batch_size")
        names = ", ".join(signal.Signals(-code).name if code < 0 else f"exit code {code}" for code in self.codes)
        return f"a worker ended too early ({names or 'unknown why'}): with --set data.workers=0 the reason shows"


class NotHandedOver(AvtrainError):
    """A batch that does not come through shared memory.

    Args:
        detail: what the system says.
        too_many_files: it is the limit on open files that is in the way.
    """

    def __init__(self, detail: str, too_many_files: bool) -> None:
        super().__init__(detail, too_many_files)
        self.detail, self.too_many_files = detail, too_many_files

    def __str__(self) -> str:
        if self.too_many_files:
            return f"a worker can't hand its batch over: too many open files; raise the limit (ulimit -n), {_WITHOUT}"
        return f"a worker can't hand its batch over through {_SHARED_MEMORY}: {self.detail}; {_MORE_ROOM}"


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


class Packed(Dataset[Any]):
    """In the worker: another dataset's batches in shared memory, as bytes that tell where; or, as bytes too, the error
    in place of one: what is meant for people goes on in the main process."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitems__(self, items: list[Any]) -> bytes:
        try:
            return _in_shared_memory(self._dataset.__getitems__(items))
        except (AvtrainError, OSError) as error:
            return pickle.dumps(error)


def _in_shared_memory(batch: Any) -> bytes:
    try:
        return bytes(ForkingPickler.dumps(batch))
    except (OSError, RuntimeError) as error:
        raise _not_handed_over(error) from error


def unpacked(loader: DataLoader[Any]) -> Iterator[Any]:
    """In the main process: the batches of a loader of `Packed` ones.

    Raises:
        AvtrainError, OSError: a worker could not be started, was ended, or its batch can't be had; or the dataset's.
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
        if str(error).startswith(_WORKER_ENDED):
            raise _ended(workers) from error
        raise


def _taken(content: bytes, workers: set[BaseProcess]) -> Any:
    try:
        made = pickle.loads(content)  # from a process of our own
    except (OSError, EOFError, RuntimeError) as error:
        if isinstance(error, ConnectionError | FileNotFoundError | EOFError):  # is it there no more?
            ended = wait([worker.sentinel for worker in workers], _PATIENCE_S)
            for worker in workers:
                worker.join(_PATIENCE_S if worker.sentinel in ended else 0)
        raise (_ended(workers) if any(worker.exitcode for worker in workers) else _not_handed_over(error)) from error
    if isinstance(made, AvtrainError | OSError):
        raise made
    return made


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


def _not_handed_over(error: Exception) -> NotHandedOver:
    """The error of torch's or the system's as one of ours."""
    too_many = isinstance(error, OSError) and error.errno == errno.EMFILE
    return NotHandedOver(in_a_line(error), too_many or any(text in str(error) for text in _TOO_MANY_FILES))


def _ended(workers: set[BaseProcess]) -> WorkerEnded:
    return WorkerEnded(frozenset(worker.exitcode for worker in workers if worker.exitcode))
