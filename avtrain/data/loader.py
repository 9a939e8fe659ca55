"""Batches in order, from worker processes, over one pass or over epochs without end; what is unreadable, counted."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from avtrain.data.handover import AHEAD, LOOK_S, begin, check_room, in_flight_bytes, made_by_workers
from avtrain.data.order import Cut, Wanted
from avtrain.errors import TooManyUnreadable, Unreadable

MOST_UNREADABLE = 0.01
PIECE_BYTES = 40 * 2**20  # eight workers of a loader then hold less than 1 GB: two of the paper's clips at a time


@dataclass
class Batch:
    """Rows of one batch: clips, or views of them. Only segments that are there are held, row by row.

    Attributes:
        visual: (seen, 3, frames, height, width) uint8, the segments that have a picture.
        audio: (heard, 1, mels, frames) float32 log-mel, those that have sound.
        visual_present, audio_present: (batch, segments) boolean, which these are.
        labels: indices of the classes of each row's clip.
        keys: of each row's clip.
        places: of each row's clip among those that were asked for.
        unreadable: the clips that are missing here because they could not be decoded.
        asked: how many clips were asked for.
    """

    visual: Tensor
    audio: Tensor
    visual_present: Tensor
    audio_present: Tensor
    labels: list[list[int]]
    keys: list[str]
    places: list[int] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    asked: int = 0

    def segments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(visual, audio) on the device.

        They are copied from pinned memory on a stream of their own, beside what the device is still computing.
        """
        if device.type != "cuda":
            return self.visual.to(device), self.audio.to(device)
        beside, current = _copies(device), torch.cuda.current_stream(device)
        with torch.cuda.stream(beside):
            copied = [tensor.pin_memory().to(device, non_blocking=True) for tensor in (self.visual, self.audio)]
        current.wait_stream(beside)
        for tensor in copied:
            tensor.record_stream(current)
        return copied[0], copied[1]

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(visual, audio, visual_present, audio_present) on the device, as `AVBert.forward` takes them: all of
        (batch, segments, ...), zeros where there is nothing."""
        presence = (self.visual_present, self.audio_present)
        visual, audio = (_spread(values, present) for values, present
                         in zip(self.segments(device), presence, strict=True))
        return visual, audio, *(present.to(device) for present in presence)  # type: ignore[return-value]


def _spread(values: Tensor, present: Tensor) -> Tensor:
    """(there, ...) and the (batch, segments) mask of these -> (batch, segments, ...)."""
    if len(values) != present.numel():
        here = present.flatten().nonzero().squeeze(1).to(values.device, non_blocking=True)
        values = values.new_zeros(present.numel(), *values.shape[1:]).index_copy(0, here, values)
    return values.view(*present.shape, *values.shape[1:])


def joined(pieces: Sequence[Batch], pin_memory: bool = False) -> Batch:
    """The rows of all pieces, which were asked for one after the other: a part of a step's batch.

    Args:
        pin_memory: they are put where a GPU can copy them from.
    """
    if len(pieces) == 1:
        return pieces[0]
    visual, audio, *presence = (
        torch.cat(tensors, out=torch.empty((sum(map(len, tensors)), *tensors[0].shape[1:]), dtype=tensors[0].dtype,
                                           pin_memory=pin_memory))
        for tensors in zip(*((piece.visual, piece.audio, piece.visual_present, piece.audio_present)
                             for piece in pieces), strict=True))
    places, before = [], 0
    for piece in pieces:
        places += [before + place for place in piece.places]
        before += piece.asked
    return Batch(visual, audio, presence[0], presence[1], [labels for piece in pieces for labels in piece.labels],
                 [key for piece in pieces for key in piece.keys], places,
                 [one for piece in pieces for one in piece.unreadable], before)


@lru_cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The device's stream of copies."""
    return torch.cuda.Stream(device)


class Supplier(Protocol):
    """What `batches` needs of a dataset, beside what torch's loader asks it for."""

    timeout_s: float  # that a batch may take

    def batch_bytes(self, at: Sequence[Any]) -> int:
        """How large the batch of what is asked for can be."""

    def ahead(self, items: Iterable[Sequence[Any]]) -> Iterator[Sequence[Any]]:
        """What batches are asked for, as it is; what it needs is made ready meanwhile."""

    def name_of(self, one: Any) -> str:
        """A clip's name, for messages, of what is asked for of it."""


def _as_it_is(batch: Any) -> Any:
    """The dataset makes whole batches."""
    return batch


def batches(dataset: Supplier, items: Iterable[Sequence[Any]], workers: int) -> Iterator[Batch]:
    """The batches in order, made ahead by worker processes (0: in this one).

    Args:
        dataset: makes them.
        items: for every batch what the dataset is asked for, nowhere more than for the first. They may go on without
            end.
        workers: processes.

    Raises:
        AvtrainError: what a worker can't read, can't hand over, or was ended by.
        OSError: what the dataset raises.
    """
    items = iter(items)
    first = next(items, None)
    if first is None:
        return
    check_room(in_flight_bytes(dataset.batch_bytes(first), workers))
    items = dataset.ahead(itertools.chain([first], items))

    def loader_of(made: Dataset[Any], asked: Iterable[Any]) -> DataLoader[Any]:
        return DataLoader(
            made, batch_sampler=cast(Iterable[list[Any]], asked), collate_fn=_as_it_is, num_workers=workers,
            prefetch_factor=AHEAD if workers else None, worker_init_fn=begin if workers else None,
            timeout=LOOK_S if workers else 0,
            # Its own, though nothing here draws from it: a loader would else take a number from the global generator
            # whenever it is made, and a run that is resumed in mid-epoch would go on with other dropout.
            generator=torch.Generator())

    yield from (made_by_workers(dataset, items, workers, dataset.timeout_s, dataset.name_of, loader_of) if workers
                else loader_of(cast(Dataset[Any], dataset), map(list, items)))


def clips_of_piece(dataset: Supplier, one: Sequence[Wanted]) -> int:
    """How many clips a worker makes at once, if they are like this one."""
    return max(1, PIECE_BYTES // max(1, dataset.batch_bytes(one)))


def piece_bytes_in_flight(dataset: Supplier, part: Sequence[Wanted], workers: int) -> int:
    """Shared memory that the workers' pieces of such parts can take."""
    return in_flight_bytes(dataset.batch_bytes(part[:clips_of_piece(dataset, part[:1])]), workers)


def in_parts(dataset: Supplier, parts: Iterable[Sequence[Wanted]], workers: int,
             pin_memory: bool = False) -> Iterator[Batch]:
    """A batch for each part, put together from small pieces, so that workers hold little shared memory.

    Args:
        dataset, workers: as in `batches`.
        parts: what each holds; they may go on without end, all with clips like the first one.
        pin_memory: as in `joined`.
    """
    counts: deque[int] = deque()  # of pieces, of the parts that have been asked for

    def pieces() -> Iterator[Sequence[Wanted]]:
        for part in parts:
            size = clips_of_piece(dataset, part[:1])
            counts.append(-(-len(part) // size))
            yield from (part[at:at + size] for at in range(0, len(part), size))

    made = batches(dataset, pieces(), workers)
    for piece in made:  # what it is a piece of is known once it is there
        others = itertools.islice(made, counts.popleft() - 1)
        yield joined([piece, *others], pin_memory)


class Epochs:
    """The batches of a run, over the epochs and without end, in parts, from any place on.

    What one epoch leaves over begins the next one's first batch: every clip is seen once an epoch, and no batch is
    smaller than the others. Workers make small pieces, so that little shared memory is held.

    Args:
        dataset: makes them.
        clips_of: what an epoch shows, from one place of it to another.
        count: how much an epoch shows.
        cut: of each batch.
        clips: how many clips the data has.
        workers: processes.
        pin_memory: parts lie where a GPU can copy them from.
    """

    def __init__(self, dataset: Supplier, clips_of: Callable[[int, int, int], list[Wanted]], count: int, cut: Cut,
                 clips: int, workers: int, pin_memory: bool = False) -> None:
        self._dataset, self._clips_of, self._count, self._workers = dataset, clips_of, count, workers
        self._unreadable, self._pin_memory, self.cut = UnreadableCount(clips), pin_memory, cut

    def __len__(self) -> int:
        return self._count

    @property
    def batch_size(self) -> int:
        """Clips of a step, of all processes."""
        return self.cut.batch_size

    @property
    def parts(self) -> int:
        """That this process takes its share of them in."""
        return self.cut.parts

    def in_flight_bytes(self) -> int:
        """Shared memory that the workers' pieces can take."""
        return piece_bytes_in_flight(self._dataset, next(self._parts(0)), self._workers)

    def wanted(self, first: int) -> list[Wanted]:
        """What the batch of all ranks holds that begins there, so many clips from the start of the first epoch."""
        found: list[Wanted] = []
        while (missing := self.cut.batch_size - len(found)) > 0:
            epoch, place = divmod(first + len(found), self._count)
            found += self._clips_of(epoch, place, min(place + missing, self._count))
        return found

    def starting_at(self, first: int) -> Iterator[Batch]:
        """This rank's parts of the batches from there on, without end."""
        for part in in_parts(self._dataset, self._parts(first), self._workers, self._pin_memory):
            self._unreadable.add(part.unreadable)
            yield part

    def _parts(self, first: int) -> Iterator[list[Wanted]]:
        cut = self.cut
        while True:
            batch = self.wanted(first)
            for of_all in range(0, cut.batch_size, cut.at_once):
                start = of_all + cut.rank * cut.micro_batch
                yield batch[start:start + cut.micro_batch]
            first += cut.batch_size


def readable(supply: Iterable[Batch], clips: int) -> Iterator[Batch]:
    """The batches that hold anything; what could not be decoded is counted.

    Args:
        supply: batches of one pass over the data.
        clips: how many the data has.

    Raises:
        AvtrainError: more than 1 % of the clips can't be decoded.
    """
    unreadable = UnreadableCount(clips)
    for batch in supply:
        unreadable.add(batch.unreadable)
        if batch.keys:
            yield batch


class UnreadableCount:
    """Counts clips that could not be decoded over a run.

    Args:
        clips: how many there are an epoch.
    """

    def __init__(self, clips: int) -> None:
        self._most = MOST_UNREADABLE * clips
        self._found: dict[tuple[str, str], Unreadable] = {}

    def add(self, unreadable: Iterable[Unreadable]) -> None:
        """Remember these.

        Raises:
            TooManyUnreadable: by now they are more than 1 % of the clips.
        """
        self._found.update({(one.shard, one.key): one for one in unreadable})
        if len(self._found) > self._most:
            raise TooManyUnreadable(list(self._found.values()))
