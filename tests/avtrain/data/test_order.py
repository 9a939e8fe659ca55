"""Which clips a batch holds: every clip once an epoch, the same for any number of processes, from any place on."""

import itertools

import pytest
import torch

from avtrain.data import loader
from avtrain.data.loader import Batch, Epochs
from avtrain.data.order import Cut, Wanted, cut_of, epoch_order, fixed_order
from avtrain.errors import AvtrainError


@pytest.mark.parametrize("shards", [[5], [1] * 7, [400, 3, 0, 1, 250], [7] * 40])
def test_every_clip_once_an_epoch_and_never_the_same_order(shards):
    orders = [epoch_order(shards, seed, epoch, 8) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == fixed_order(shards)
    assert orders == [epoch_order(shards, seed, epoch, 8) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_an_epoch_moves_through_some_shards_at_a_time():
    order = epoch_order([7] * 40, 0, 0, 8)
    groups = [{shard for shard, _ in order[first:first + 56]} for first in range(0, 280, 56)]
    assert all(len(group) == 8 for group in groups) and len(set.union(*groups)) == 40
    assert [shard for shard, _ in order[:14]] != sorted(shard for shard, _ in order[:14])  # mixed within


@pytest.mark.parametrize(("ranks", "workers", "shards"), [
    (1, 0, [7]), (2, 1, [7]), (2, 2, [3, 4, 1]), (3, 2, [3] * 7), (4, 0, [1, 2, 3]), (1, 2, [1] * 7)])
def test_every_clip_is_seen_once_an_epoch_by_one_rank_and_batches_stay_full(ranks, workers, shards):
    """Counted over what every rank's loader gives, through three epochs that no batch ends with."""
    clips, batch_size = sum(shards), 2 * ranks
    seen = []
    for rank in range(ranks):
        supply = Epochs(Names(), _clips_of(shards), clips, Cut(batch_size, 1, rank, ranks), clips, workers)
        assert supply.parts == 2
        seen.append([batch.keys for batch in itertools.islice(supply.starting_at(0), 2 * (3 * clips // batch_size))])
    parts = [[key for keys in together for key in keys] for together in zip(*seen, strict=True)]
    assert all(len(part) == ranks for part in parts)
    line = [key for part in parts for key in part]
    for epoch in range(3):
        inside = line[epoch * clips:(epoch + 1) * clips]
        assert len(set(inside)) == len(inside) and all(key.endswith(f"@{epoch}") for key in inside)
    assert len(line) == 3 * clips // batch_size * batch_size


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_batch_holds_the_same_clips_for_any_number_of_ranks_from_any_place_on(ranks):
    clips_of = _clips_of([5, 6])
    for first in (0, 8, 24):
        together = [Epochs(Names(), clips_of, 11, Cut(8, 4 // ranks, rank, ranks), 11, 0).starting_at(first)
                    for rank in range(ranks)]
        whole = Epochs(Names(), clips_of, 11, Cut(8, 4), 11, 0).starting_at(first)
        for _ in range(4):
            assert [key for supply in together for key in next(supply).keys] == next(whole).keys


@pytest.mark.parametrize(("batch", "micro", "ranks", "message"), [
    (256, 16, 64, r"batch_size=256 can't be divided among 64 processes in parts of training.micro_batch=16: "
                  r"set training.micro_batch=4"),
    (10, None, 3, "among 3 processes: choose a training.batch_size that 3 divides"),
    (12, 5, 1, "among one process in parts of training.micro_batch=5: set training.micro_batch=4")])
def test_a_batch_that_does_not_come_out_even_is_refused_with_a_number_that_does(batch, micro, ranks, message):
    with pytest.raises(AvtrainError, match=message):
        cut_of(batch, micro, 0, ranks)
    assert cut_of(256, 16, 3, 8).parts == 2 and cut_of(256, None, 0, 64).micro_batch == 4


@pytest.mark.parametrize("clips", [1, 2, 7])
def test_a_part_is_put_together_from_pieces_however_large_they_are(monkeypatch, clips):
    parts = [[Wanted(place, 0) for place in epoch_order([4, 9], 0, 0, 2)][first:first + 6] for first in (0, 6, 12)]
    monkeypatch.setattr(loader, "PIECE_BYTES", clips * 30 * 2**20)
    for workers in (0, 2):
        made = list(loader.in_parts(Names(), parts, workers))
        assert [batch.keys for batch in made] == [Names().__getitems__(part).keys for part in parts]
        assert [batch.places for batch in made] == [list(range(6)), list(range(6)), [0]]


def test_workers_hold_little_shared_memory_however_large_a_part_is():
    part = [Wanted(place, 0) for place in fixed_order([256])]
    for clips in (16, 256):
        assert 0 < loader.piece_bytes_in_flight(Names(), part[:clips], 8) < 1e9  # a clip has 30 MB here


class Names:
    """Batches that hold the names of their clips; one clip is a piece."""

    timeout_s = 60

    def name_of(self, one):
        return str(one)

    def __getitems__(self, wanted, begins=int):
        names = [f"{one.place.shard}/{one.place.position}@{one.epoch}" for one in wanted]
        present = torch.ones(len(wanted), 1, dtype=torch.bool)
        nothing = torch.zeros(len(wanted), 1)
        return Batch(nothing, nothing, present, present, [[] for _ in names], names, list(range(len(names))), [],
                     len(names))

    def batch_bytes(self, wanted):
        return len(wanted) * 30 * 2**20

    def ahead(self, items):
        return items


def _clips_of(shards):
    def clips_of(epoch, first, last):
        return [Wanted(place, epoch) for place in epoch_order(shards, 0, epoch, 2)[first:last]]

    return clips_of
