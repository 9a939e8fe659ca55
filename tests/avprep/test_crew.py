"""Shards under way share one crew: all workers, a bounded number of clips, and an end when one of them fails."""

import gc
import threading
import time
import weakref
from contextlib import closing

import pytest

from avprep.clips import Clip
from avprep.executors import run_local
from avprep.progress import Count
from avprep.shards import ShardWriter


class Busy:
    """Makes results in little time; knows how many are made at once, and how many are not taken yet."""

    def __init__(self):
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = self.begun = self.taken = self.most_not_taken = 0

    def make(self, item):
        with self.lock:
            self.begun += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            self.most_not_taken = max(self.most_not_taken, self.begun - self.taken)
        time.sleep(0.3 if item.endswith(" 0") else 0.01)  # what comes after the first waits for it
        with self.lock:
            self.at_once -= 1
        return item

    def shard(self, task, crew, count):
        items = []
        for item in crew.make(self.make, (f"{task} {number}" for number in range(30))):
            items.append(item)
            time.sleep(0.002)
            with self.lock:
                self.taken += 1
        return items


@pytest.mark.parametrize("shards", [1, 5])
def test_all_workers_share_the_clips_of_the_shards_under_way(shards):
    busy = Busy()
    made = list(run_local(busy.shard, range(shards), Count(), 4))
    assert sorted(made) == [[f"{shard} {number}" for number in range(30)] for shard in range(shards)]
    assert busy.most_at_once == 4
    assert busy.most_not_taken <= 4 * 4 + 5  # what a shard took, it may be about to count


def test_a_shard_hands_out_its_work_before_the_next_begins():
    order, lock = [], threading.Lock()

    def shard(task, crew, count):
        def items():
            with crew.turn:
                for number in range(5):
                    with lock:
                        order.append(task)
                    yield number

        with closing(items()) as todo:
            return list(crew.make(lambda item: time.sleep(0.005), todo))

    list(run_local(shard, range(4), Count(), 2))
    assert len(order) == 20 and all(len(set(order[first:first + 5])) == 1 for first in range(0, 20, 5))


def test_a_shard_that_fails_ends_all_of_them():
    begun = []

    def shard(task, crew, count):
        begun.append(task)

        def make(item):
            time.sleep(0.01)
            if (task, item) == (1, 3):
                raise OSError("the disk is full")

        def items():
            with crew.turn:
                yield from range(20)

        with closing(items()) as todo, closing(crew.make(make, todo)) as made:
            return list(made)

    with pytest.raises(OSError, match="disk is full"):
        list(run_local(shard, range(1000), Count(), 2))
    assert len(begun) < 50


@pytest.mark.slow
def test_results_are_not_kept():
    class Result:
        pass

    alive = []
    for result in run_local(lambda task, crew, count: Result(), range(20), Count(), 1):
        alive.append(weakref.ref(result))
        del result
        time.sleep(0.01)
        gc.collect()
        assert sum(one() is not None for one in alive) == 0


def test_the_shard_of_a_build_that_fails_is_gone_for_good(tmp_path):
    """Nothing of it writes on when it is collected: such an error would fail this test."""
    with pytest.raises(OSError, match="disk is full"), ShardWriter(tmp_path / "x.tar") as writer:
        writer.add(Clip("a", {"json": b"{}"}, {}))
        raise OSError("the disk is full")
    del writer
    gc.collect()
    assert not list(tmp_path.iterdir())
