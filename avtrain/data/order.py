"""In which order clips are seen: a pure function of the shards' sizes, the seed and the epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from avtrain.errors import AvtrainError


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


def batches_of(order: Sequence[ClipPlace], batch_size: int) -> list[list[ClipPlace]]:
    """One after the other; the last one is smaller where the clips do not come out even."""
    return [list(order[first:first + batch_size]) for first in range(0, len(order), batch_size)]


@dataclass(frozen=True)
class Cut:
    """How a step's batch is divided: into parts, which are computed one after the other, and each among the ranks.

    Part j is the clips [j, j + 1) x ranks x micro_batch of the batch, of which rank r has the r-th micro_batch. So a
    batch, and each of its parts, holds the same clips for any number of ranks.

    Attributes:
        batch_size: clips of a step, of all ranks.
        micro_batch: clips that a rank computes at once.
        rank, ranks: this process, of so many.
    """

    batch_size: int
    micro_batch: int
    rank: int = 0
    ranks: int = 1

    @property
    def at_once(self) -> int:
        """Clips of a part, of all ranks."""
        return self.micro_batch * self.ranks

    @property
    def parts(self) -> int:
        """Of a batch."""
        return self.batch_size // self.at_once


def cut_of(batch_size: int, micro_batch: int | None, rank: int = 0, ranks: int = 1, section: str = "training") -> Cut:
    """The batch in parts of `micro_batch` clips a rank; None: each rank computes its whole share at once.

    Raises:
        AvtrainError: it does not come out even.
    """
    if micro_batch is None and batch_size % ranks == 0:
        return Cut(batch_size, batch_size // ranks, rank, ranks)
    if micro_batch is None or batch_size % (micro_batch * ranks):
        share, rest = divmod(batch_size, ranks)
        of = f"{ranks} processes" if ranks > 1 else "one process"
        fitting = [size for size in range(1, share + 1) if share % size == 0 and (micro_batch is None or
                                                                                size <= micro_batch)]
        instead = (f"set {section}.micro_batch={fitting[-1]}" if not rest and fitting else
                   f"choose a {section}.batch_size that {ranks} divides")
        asked = f" in parts of {section}.micro_batch={micro_batch}" if micro_batch else ""
        raise AvtrainError(f"{section}.batch_size={batch_size} can't be divided among {of}{asked}: {instead}")
    return Cut(batch_size, micro_batch, rank, ranks)
