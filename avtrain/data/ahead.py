"""Shards of stores, fetched into the cache before their turn comes, by a process beside the run."""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from avtrain.data import cache
from avtrain.data.handover import forking, listening
from avtrain.data.shards import Shard
from avtrain.data.storage import is_remote
from avtrain.errors import AvtrainError

_AHEAD_BYTES = 4e9  # two times eight shards as `avprep build` makes them: those in turn, and the next


def fetched_ahead(items: Iterable[Sequence[Any]], shards: Sequence[Shard]) -> Iterator[Sequence[Any]]:
    """The items as they are; what they need next is being fetched meanwhile. Whoever needs a shard that is not there
    yet waits for it, or fetches it; what can't be had is said by whoever needs it.

    Args:
        items: for every batch its clips, each of which begins with its place.
        shards: by number.
    """
    if not any(is_remote(shard.url) for shard in shards):
        yield from items
        return
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_fetch, args=(receiving, sending, shards),
                                                           daemon=True)
    with forking():
        process.start()
    receiving.close()
    room = min(_AHEAD_BYTES, cache.limit_bytes() / 2)
    waiting: deque[Sequence[Any]] = deque()
    wanted: Counter[int] = Counter()  # the shards of those that wait
    try:
        for item in items:
            waiting.append(item)
            for shard in _shards_of(item):
                if shard not in wanted:
                    with suppress(OSError):  # it was killed: the rest is fetched by whoever needs it
                        sending.send(shard)
                wanted[shard] += 1
            # Further than all shards there is nothing to see.
            while waiting and (len(wanted) == len(shards) or sum(shards[shard].size for shard in wanted) >= room):
                yield _next(waiting, wanted)
        while waiting:
            yield _next(waiting, wanted)
    finally:
        sending.close()
        process.terminate()
        process.join()


def _shards_of(item: Sequence[Any]) -> list[int]:
    return list(dict.fromkeys(one[0][0] for one in item))


def _next(waiting: deque[Sequence[Any]], wanted: Counter[int]) -> Sequence[Any]:
    item = waiting.popleft()
    wanted.subtract(_shards_of(item))
    for shard in [shard for shard, count in wanted.items() if not count]:
        del wanted[shard]
    return item


def _fetch(asked: Connection, asking: Connection, shards: Sequence[Shard]) -> None:
    """In the process beside the run: fetch what is asked for, one after the other, until nobody can ask any more."""
    asking.close()
    with suppress(KeyboardInterrupt, EOFError):
        listening(signal.default_int_handler)  # an unfinished file is then removed
        while True:
            shard = shards[asked.recv()]
            with suppress(AvtrainError):
                cache.kept(shard.url, shard.size, shard.sha256)
