"""In which order clips are seen: a pure function of the shards' sizes, the seed and the epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


class ClipPlace(NamedTuple):
    """Where a clip is: shard number and position in the shard."""

    shard: int
    position: int


class Wanted(NamedTuple):
    """A clip as an epoch shows it: in whole, or one of its evenly spaced views."""

    place: ClipPlace
    epoch: int
    part: int | None = None


def epoch_order(clips_of_shards: Sequence[int], seed: int, epoch: int, shards_at_once: int) -> list[ClipPlace]:
    """Every clip exactly once, shuffled.

    Shards are shuffled, then clips within groups of `shards_at_once` of them, so that reading moves through the
    shards and a remote one is fetched when its turn comes.
    """
    random = np.random.default_rng([seed, epoch])
    shards = random.permutation(len(clips_of_shards))
    order: list[ClipPlace] = []
    for first in range(0, len(shards), shards_at_once):
        group = [ClipPlace(int(shard), position) for shard in shards[first:first + shards_at_once]
                 for position in range(clips_of_shards[shard])]
        order += [group[index] for index in random.permutation(len(group))]
    return order


def fixed_order(clips_of_shards: Sequence[int]) -> list[ClipPlace]:
    """Every clip once, as the shards have them: for evaluation."""
    return [ClipPlace(shard, position) for shard, clips in enumerate(clips_of_shards) for position in range(clips)]


def at_epoch(batches: Iterable[Sequence[ClipPlace]], epoch: int) -> Iterator[list[Wanted]]:
    """Every place with the epoch that it is seen in."""
    for batch in batches:
        yield [Wanted(place, epoch) for place in batch]


def batches_of(order: Sequence[ClipPlace], batch_size: int, rank: int = 0, ranks: int = 1) -> list[list[ClipPlace]]:
    """The batches of one rank. Together the ranks see every clip once; each has the same number of batches.

    The last batches are smaller where the clips do not come out even. Where there are fewer left than ranks, the
    ranks that would get none repeat a clip from the start, so that all take the same number of steps.
    """
    batches = []
    for first in range(0, len(order), batch_size * ranks):
        together = list(order[first:first + batch_size * ranks])
        together += [order[index % len(order)] for index in range(max(0, ranks - len(together)))]
        batches.append(together[rank::ranks])
    return batches
