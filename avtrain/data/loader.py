"""Batches in order, from worker processes, over one pass or over epochs without end; what is unreadable, counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from avtrain.data.handover import AHEAD, Packed, begin, check_room, in_flight_bytes, unpacked
from avtrain.data.order import Wanted
from avtrain.errors import TooManyUnreadable, Unreadable

MOST_UNREADABLE = 0.01


@dataclass
class Batch:
    """Rows of one batch: clips, or views of them. What is absent is marked in the presence masks.

    Attributes:
        visual: (batch, segments, 3, frames, height, width) uint8.
        audio: (batch, segments, 1, mels, frames) float32 log-mel.
        visual_present, audio_present: (batch, segments) boolean.
        labels: indices of the classes of each row's clip.
        keys: of each row's clip.
        places: of each row's clip among those that were asked for.
        unreadable: the clips that are missing here because they could not be decoded.
    """

    visual: Tensor
    audio: Tensor
    visual_present: Tensor
    audio_present: Tensor
    labels: list[list[int]]
    keys: list[str]
    places: list[int] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(visual, audio, visual_present, audio_present) on the device.

        They are copied from pinned memory on a stream of their own, beside what the device is still computing.
        """
        here = (self.visual, self.audio, self.visual_present, self.audio_present)
        if device.type != "cuda":
            visual, audio, visual_present, audio_present = (tensor.to(device) for tensor in here)
            return visual, audio, visual_present, audio_present
        beside, current = _copies(device), torch.cuda.current_stream(device)
        with torch.cuda.stream(beside):
            copied = [tensor.pin_memory().to(device, non_blocking=True) for tensor in here]
        current.wait_stream(beside)
        for tensor in copied:
            tensor.record_stream(current)
        return copied[0], copied[1], copied[2], copied[3]


@lru_cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The device's stream of copies."""
    return torch.cuda.Stream(device)


class Supplier(Protocol):
    """What `batches` needs of a dataset, beside what torch's loader asks it for."""

    def batch_bytes(self, at: Sequence[Any]) -> int:
        """How large the batch of what is asked for can be."""


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
    loader = DataLoader(
        Packed(dataset) if workers else cast(Dataset[Any], dataset),
        batch_sampler=map(list, itertools.chain([first], items)), collate_fn=_as_it_is,
        num_workers=workers, prefetch_factor=AHEAD if workers else None,
        worker_init_fn=begin if workers else None,
        # Its own, though nothing here draws from it: a loader would else take a number from the global generator
        # whenever it is made, and a run that is resumed in mid-epoch would go on with other dropout.
        generator=torch.Generator())
    yield from unpacked(loader) if workers else loader


class Epochs:
    """The batches of every epoch, from any place on.

    Args:
        dataset: makes them.
        of_epoch: what each batch of an epoch is made of.
        count: how many batches each epoch has.
        clips: how many clips the data has.
        workers: processes.
    """

    def __init__(self, dataset: Supplier, of_epoch: Callable[[int], Iterable[Sequence[Wanted]]], count: int, clips: int,
                 workers: int) -> None:
        self._dataset, self._of_epoch, self._count, self._workers = dataset, of_epoch, count, workers
        self._unreadable = UnreadableCount(clips)

    def __len__(self) -> int:
        return self._count

    def in_flight_bytes(self) -> int:
        """Shared memory that the workers' batches can take."""
        return in_flight_bytes(self._dataset.batch_bytes(next(self._from(0, 0))), self._workers)

    def starting_at(self, epoch: int, batch: int) -> Iterator[Batch]:
        """The batches from there on, over the epochs, without end."""
        for one in batches(self._dataset, self._from(epoch, batch), self._workers):
            self._unreadable.add(one.unreadable)
            yield one

    def _from(self, epoch: int, batch: int) -> Iterator[Sequence[Wanted]]:
        while True:
            yield from itertools.islice(self._of_epoch(epoch), batch, None)
            epoch, batch = epoch + 1, 0


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
