"""The threads and header readers of one process, shared by all shards that it has under way."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

from avprep.headers import HeaderReaders

Item = TypeVar("Item")
Result = TypeVar("Result")
_CLIPS_PER_WORKER = 4
# Headers take milliseconds where a clip takes a second; a few are read ahead, so that no worker waits for one.
_WORKERS_PER_READER = 4
_READ_AHEAD = 16


class Crew:
    """Makes clips with `workers` threads: the work is ffmpeg's, a process of its own for each clip, and numpy's.

    However many shards are under way, only a few clips a worker are being made or waiting to be written. A context
    manager: leaving it stops all work; who waits for a result then gets an error.

    Attributes:
        readers: read headers, in processes that may die.
        turn: held by the one shard that hands out work. The next begins when all of that is handed out, so that the
            last clips of a shard keep no worker idle, and few shards are half done if the run is killed.
    """

    def __init__(self, workers: int) -> None:
        count = 1 + workers // _WORKERS_PER_READER
        self._makers = ThreadPoolExecutor(workers)
        self._probers = ThreadPoolExecutor(count)
        self._room = threading.Semaphore(_CLIPS_PER_WORKER * workers)
        self.readers = HeaderReaders(count)
        self.turn = threading.Lock()

    def make(self, do: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
        """The results in the order of the items, which are drawn as there is room."""
        under_way: deque[Future[Result]] = deque()
        try:
            for item in items:
                # While others hold the room they also give it back; what is our own only we can.
                while not self._room.acquire(blocking=not under_way):
                    yield self._next(under_way)
                under_way.append(self._makers.submit(do, item))
            while under_way:
                yield self._next(under_way)
        finally:
            for future in under_way:
                future.cancel()
                self._room.release()

    def _next(self, under_way: deque[Future[Result]]) -> Result:
        try:
            return under_way[0].result()
        finally:
            under_way.popleft()
            self._room.release()

    def read_ahead(self, do: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The results in the order of the items, by the threads for headers."""
        under_way: deque[Future[Result]] = deque()
        for item in items:
            under_way.append(self._probers.submit(do, item))
            if len(under_way) >= _READ_AHEAD:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pool in (self._makers, self._probers):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (self._makers, self._probers):
            pool.shutdown(wait=True)
        self.readers.__exit__(kind, error, at)
