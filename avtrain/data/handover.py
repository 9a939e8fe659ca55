"""Batches from worker processes to this one, through shared memory. None is lost in silence: a loss would be waited for
without end.

torch's loader hands batches over in a thread of the worker, which prints what goes wrong there and drops the batch.
Here a batch is put into shared memory where the worker makes it, and what goes wrong is an error like any other, which
comes to this process as it was raised; torch would make a text of it.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from multiprocessing import AuthenticationError
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from multiprocessing.sharedctypes import RawArray
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from avtrain.errors import AvtrainError, in_a_line

AHEAD = 2  # batches that each worker makes ahead
LOOK_S = 1.0  # between two looks at workers whose batch is awaited
_PATIENCE_S = 5  # for a process that ends
_LOG = logging.getLogger(__name__)
_OURS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # signals that the main process listens to
_SHARED_MEMORY = "/dev/shm"
_WITHOUT = "or make them without workers: --set data.workers=0"
_MORE_ROOM = f"give it more (docker run --shm-size=2g, or --ipc=host), {_WITHOUT}"
# How torch, and Python where it hands over files, begin or put what has no class of its own.
_WORKER_ENDED = "DataLoader worker (pid"
_NONE_YET = "DataLoader timed out"
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


class WorkerHangs(AvtrainError):
    """A worker makes no batch.

    Args:
        timeout_s: so long it was waited for.
    """

    def __init__(self, timeout_s: float) -> None:
        super().__init__(timeout_s)
        self.timeout_s = timeout_s

    def __str__(self) -> str:
        return f"a worker has made no batch for {self.timeout_s:.0f} s (data.timeout_s)"


class LostTwice(AvtrainError):
    """Workers were lost where they had been lost before.

    Args:
        how: they were.
        making: the clip, or the first of the batch, that was being made; "": unknown.
    """

    def __init__(self, how: AvtrainError, making: str) -> None:
        super().__init__(how, making)
        self.how, self.making = how, making

    def __str__(self) -> str:
        making = f", while it made {self.making}" if self.making else ""
        return f"{self.how}; it was for the second time{making}"


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


@contextmanager
def forking() -> Iterator[None]:
    """Processes that are begun inside hear no signal until they have said what it means to them: see `listening`.

    With the handlers of this process, an exception could carry a copy of it out of where it was forked, and on.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def listening(ends: Callable[[int, Any], Any]) -> None:
    """In a process that was begun so: `ends` is what SIGTERM does."""
    # What ends or stops the whole group of processes is for the main one to hear: it still needs this one's work.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, ends)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OURS)


def begin(worker: int) -> None:
    """The start of a worker process."""
    torch.set_num_threads(1)
    # A worker that is told to end unwinds first: an unfinished download leaves nothing behind.
    listening(_unwind)
    sys.excepthook = _quiet


def _quiet(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Of the thread that hands batches over: that nobody takes them any more is for the main process to say."""
    if not isinstance(error, OSError | EOFError | AuthenticationError):
        sys.__excepthook__(kind, error, traceback)


def _unwind(number: int, frame: object) -> None:
    """Once: where the group is told to end, the main process tells its workers too."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


class Notes:
    """What each worker is making, where all processes see it: a batch's number, and a clip's in it.

    Args:
        workers: how many there are.
    """

    def __init__(self, workers: int) -> None:
        self._rows = RawArray("q", 3 * workers)  # process, batch, clip

    def write(self, worker: int, batch: int, clip: int) -> None:
        """In the worker: it is making this. -1: nothing."""
        self._rows[3 * worker:3 * worker + 3] = [os.getpid(), batch, clip]

    def of(self, processes: set[int | None]) -> list[tuple[int, int]]:
        """(batch, clip) that each of these processes is making, the earliest first."""
        rows = (self._rows[first:first + 3] for first in range(0, len(self._rows), 3))
        return sorted((batch, clip) for process, batch, clip in rows if process in processes and batch >= 0)


class Packed(Dataset[Any]):
    """In the worker: another dataset's batches in shared memory, as bytes that tell where; or, as bytes too, the error
    in place of one: what is meant for people goes on in the main process.

    Args:
        dataset: calls what it is given as the second argument with the place of each clip that it is going to make.
        notes: of what is being made.
    """

    def __init__(self, dataset: Any, notes: Notes) -> None:
        self._dataset, self._notes = dataset, notes

    def __getitems__(self, numbered: tuple[int, list[Any]]) -> bytes:
        (number, items), worker = numbered, get_worker_info().id  # type: ignore[union-attr]
        self._notes.write(worker, number, 0)
        try:
            content = _in_shared_memory(self._dataset.__getitems__(
                items, lambda clip: self._notes.write(worker, number, clip)))
        except (AvtrainError, OSError) as error:
            content = pickle.dumps(error)
        self._notes.write(worker, -1, -1)  # not where it is told to end, as one that hangs is: what it made is asked
        return content


def _in_shared_memory(batch: Any) -> bytes:
    try:
        return bytes(ForkingPickler.dumps(batch))
    except (OSError, RuntimeError) as error:
        raise _not_handed_over(error) from error


class _Lost(Exception):
    """Workers that are gone, or make nothing: how, and which of them, by their process."""

    def __init__(self, how: AvtrainError, processes: Iterable[int | None]) -> None:
        super().__init__(how)
        self.how, self.processes = how, set(processes)


def made_by_workers(dataset: Any, items: Iterable[Any], workers: int, timeout_s: float, name_of: Callable[[Any], str],
                    loader_of: Callable[[Dataset[Any], Iterable[Any]], DataLoader[Any]]) -> Iterator[Any]:
    """The batches of `items` in order. Where workers are lost, all are started again, once at the same place.

    Args:
        dataset: makes a batch of an item.
        items: they may go on without end.
        workers: processes.
        timeout_s: a batch that is awaited for so long does not come.
        name_of: a clip's name, for messages, of what an item has at its place.
        loader_of: a loader of this dataset and these batches.

    Raises:
        AvtrainError, OSError: a worker could not be started, was lost twice, or its batch can't be had; or the
            dataset's.
    """
    asked: deque[Any] = deque()  # of the loader; their batches have not come yet
    items, came, lost_at = iter(items), 0, set()
    while True:
        again, notes = list(asked), Notes(workers)
        asked.clear()
        loader = loader_of(Packed(dataset, notes), _numbered(chain(again, items), came, asked))
        try:
            for batch in _unpacked(loader, timeout_s):
                asked.popleft()
                came += 1
                yield batch
            return
        except _Lost as lost:
            number, clip = next(iter(notes.of(lost.processes)), (came, -1))
            making = name_of(asked[number - came][clip]) if clip >= 0 else ""
            if number in lost_at:
                raise LostTwice(lost.how, making) from lost
            lost_at.add(number)
            _LOG.warning("%s; workers are started again%s", lost.how, f" at {making}" if making else "")


def _numbered(items: Iterable[Any], first: int, asked: deque[Any]) -> Iterator[tuple[int, list[Any]]]:
    for number, item in enumerate(items, first):
        asked.append(item)
        yield number, list(item)


def _unpacked(loader: DataLoader[Any], timeout_s: float) -> Iterator[Any]:
    """In the main process: the batches of a loader of `Packed` ones."""
    before = set(multiprocessing.active_children())
    try:
        supply = _started(loader)
    except OSError as error:
        raise AvtrainError(f"workers can't be started: {error.strerror or error}; is {_SHARED_MEMORY} full? Then "
                           f"{_MORE_ROOM}") from error
    workers = set(multiprocessing.active_children()) - before
    try:
        while (content := _next(supply, workers, timeout_s)) is not None:
            yield _taken(content, workers)
    finally:
        try:
            for worker in workers:
                worker.terminate()
            _wait_for(workers)
        finally:
            for worker in workers:
                worker.kill()
        # Now, not when the last traceback that holds the loader is collected. torch has no public name for it.
        supply._shutdown_workers()


def _next(supply: Iterator[Any], workers: set[BaseProcess], timeout_s: float) -> bytes | None:
    began = time.monotonic()
    while True:
        try:
            content: bytes | None = next(supply, None)
            return content
        except RuntimeError as error:
            if str(error).startswith(_WORKER_ENDED):
                raise _ended(workers) from error
            if not str(error).startswith(_NONE_YET):
                raise
        if time.monotonic() - began >= timeout_s:
            raise _Lost(WorkerHangs(timeout_s), (worker.pid for worker in workers))


def _wait_for(workers: set[BaseProcess]) -> None:
    """Until they have ended, but not without end."""
    until = time.monotonic() + _PATIENCE_S
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))


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
    writing a checkpoint. Another loader in this process may have left it behind.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", "").startswith("torch."):
        handler = signal.SIG_DFL
    with forking():
        supply = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return supply


def _not_handed_over(error: Exception) -> NotHandedOver:
    """The error of torch's or the system's as one of ours."""
    too_many = isinstance(error, OSError) and error.errno == errno.EMFILE
    return NotHandedOver(in_a_line(error), too_many or any(text in str(error) for text in _TOO_MANY_FILES))


def _ended(workers: set[BaseProcess]) -> _Lost:
    ended = [worker for worker in workers if worker.exitcode]
    return _Lost(WorkerEnded(frozenset(worker.exitcode for worker in ended if worker.exitcode)),
                 (worker.pid for worker in ended))
