"""Shards read from their start to their end, for stores too far away for anything else.

A worker has shards of its own and shuffles among as many clips as it keeps. webdataset's parts do what comes after a
shard is opened; opening is ours. The order is still a function of seed and epoch, so that a batch is known before it is
read, every clip comes once an epoch, and a run goes on where it was; but it is another for another number of processes
or workers.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from avtrain.data.decode import decode_log_mel, decode_rgb
from avtrain.data.manifest import MEMBERS
from avtrain.data.order import ClipPlace, Cut
from avtrain.data.shards import Shard, ShardFolder, open_folders
from avtrain.data.storage import NotFetched, Passing, blocks, is_remote, patiently
from avtrain.errors import AvtrainError

_BLOCK_BYTES = 1 << 20
_MOST_OPEN = 64


@dataclass(frozen=True)
class Streams:
    """Who reads what of a run's batches: each worker of each process is a stream, numbered process by process.

    Attributes:
        cut: of each batch.
        piece: clips that a worker makes at once.
        workers: of each process; at least 1.
    """

    cut: Cut
    piece: int
    workers: int

    @property
    def count(self) -> int:
        """Of all processes."""
        return self.cut.ranks * self.workers

    def of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The stream of each place, counted from the run's first clip on. The workers take turns, piece by piece."""
        cut = self.cut
        parts, in_part = np.divmod(places, cut.at_once)
        ranks, in_share = np.divmod(in_part, cut.micro_batch)
        pieces = parts * -(-cut.micro_batch // self.piece) + in_share // self.piece
        return np.asarray(ranks * self.workers + pieces % self.workers)


def stream_order(clips_of_shards: Sequence[int], seed: int, epoch: int, streams: Streams,
                 buffer: int) -> list[ClipPlace]:
    """Every clip exactly once. Shards are shuffled and dealt out to the streams, in runs; each stream then shuffles its
    clips among `buffer` of them as they come."""
    from webdataset.filters import shuffle

    count = sum(clips_of_shards)
    shown_by = streams.of(np.arange(epoch * count, (epoch + 1) * count, dtype=np.int64))
    shards = np.random.default_rng([seed, epoch]).permutation(len(clips_of_shards)).tolist()
    line = [ClipPlace(shard, position) for shard in shards for position in range(clips_of_shards[shard])]
    ends = np.bincount(shown_by, minlength=streams.count).cumsum().tolist()
    supplies = [shuffle(buffer, initial=buffer, seed=f"{seed} {epoch} {number}")(iter(line[start:end]))
                for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    return [next(supplies[number]) for number in shown_by.tolist()]


@dataclass
class _OpenShard:
    """A shard that is being read. `next`: the position that its next clip has."""

    clips: Iterator[tuple[ClipPlace, dict[str, bytes]]]
    next: int = 0


class StreamReader:
    """Reads clips by their place, as `ShardReader` does, where the places asked for go through the shards one after the
    other: what comes before them is kept until it is asked for.

    Args:
        folder: the shards.
        room: clips that are kept. One that had to go is read by its bytes when it is asked for.
    """

    def __init__(self, folder: ShardFolder, room: int) -> None:
        self._folder, self._room = folder, room
        self._open: dict[int, _OpenShard] = {}
        self._kept: dict[ClipPlace, dict[str, bytes]] = {}
        self._let_go: set[ClipPlace] = set()

    def read(self, shard: int, position: int, modality: str = "both") -> tuple[str, dict[str, bytes]]:
        """The key of a clip, and its pictures and its sound by ending, as far as they are there and wanted.

        Raises:
            AvtrainError: the shard can't be had, or is not what index and manifest say.
        """
        place = ClipPlace(shard, position)
        if place not in self._kept and place not in self._let_go:
            self._read_on_to(place)
        members = self._kept.pop(place, None)
        if members is None:
            self._let_go.discard(place)
            members = {ending: _part(self._folder.shards[shard], *member)
                       for ending, member in self._folder.rows.members(place).items()}
        unwanted = {"visual": "logmel.npy", "audio": "mp4"}.get(modality)
        return self._folder.rows.at(place).key, {ending: content for ending, content in members.items()
                                                 if ending != unwanted}

    def _read_on_to(self, place: ClipPlace) -> None:
        shard = self._open.pop(place.shard, None)
        if shard is None or shard.next > place.position:  # or, in another epoch, from the start
            shard = _OpenShard(self._clips_of(place.shard))
            self._let_go = {other for other in self._let_go if other.shard != place.shard}
            if len(self._open) >= _MOST_OPEN:  # of an epoch long past, in which another stream had the rest
                del self._open[next(iter(self._open))]
        for there, members in shard.clips:
            shard.next = there.position + 1
            self._keep(there, members)
            if there == place:
                break
        if shard.next < self._folder.shards[place.shard].clips:
            self._open[place.shard] = shard
        else:
            next(shard.clips, None)  # its end, where the checksum is compared

    def _keep(self, place: ClipPlace, members: dict[str, bytes]) -> None:
        if len(self._kept) >= self._room:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            self._let_go.add(oldest)
        self._kept[place] = members

    def _clips_of(self, number: int) -> Iterator[tuple[ClipPlace, dict[str, bytes]]]:
        shard, position = self._folder.shards[number], -1
        for position, sample in enumerate(samples([shard])):
            place = ClipPlace(number, position)
            if position >= shard.clips or sample["__key__"] != self._folder.rows.at(place).key:
                break
            yield place, {ending: sample[ending] for ending in MEMBERS if ending in sample}
        else:
            if position + 1 == shard.clips:
                return
        raise AvtrainError(f"{shard.name} does not go with its manifest: run `avprep verify`, or build the split again "
                           "with `avprep build`")


def samples(shards: Iterable[Shard]) -> Iterator[dict[str, Any]]:
    """webdataset's samples of some shards, one after the other: `__key__`, `__url__`, and the members by ending.

    Raises:
        AvtrainError: a shard can't be had, is no tar, or has another checksum than its index says.
    """
    from webdataset.tariterators import group_by_keys

    for shard in shards:
        stream = io.BufferedReader(_Stream(_whole(shard)), _BLOCK_BYTES)
        try:
            yield from group_by_keys(_members(stream, shard))
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise AvtrainError(f"{shard.name} can't be read as a tar: run `avprep verify`, or copy it again") from error
        while stream.read(_BLOCK_BYTES):  # what stands behind the last member
            pass


def _members(stream: Any, shard: Shard) -> Iterator[dict[str, Any]]:
    """The files of a tar as webdataset groups them. Not by its own reader, which unpacks what is compressed or sparse,
    whatever it comes to.

    Raises:
        TarError: a member is no plain file, or longer than the shard.
    """
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.sparse and not member.pax_headers
            if not plain or member.offset_data + member.size > shard.size:
                raise tarfile.ReadError(f"{member.name[:100]!r} is no plain file of this shard")
            content = tar.extractfile(member)
            assert content is not None
            yield {"fname": member.name, "data": content.read(), "__url__": shard.name}
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all


class _Stream(io.RawIOBase):
    """A file that is read from its start to its end."""

    def __init__(self, source: Iterator[bytes]) -> None:
        self._source, self._rest = source, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        while not self._rest:
            block = next(self._source, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        size = min(len(into), len(self._rest))
        into[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _whole(shard: Shard) -> Iterator[bytes]:
    """A shard's content, gone on with where a connection broke; its checksum is compared at the end."""
    digest, size = hashlib.sha256(), 0
    for block in _from_store(shard) if is_remote(shard.url) else _from_here(shard):
        digest.update(block)
        size += len(block)
        yield block
    if size != shard.size or digest.hexdigest() != shard.sha256:
        raise NotFetched(shard.name, "its checksum is not the one in its index",
                         "copy the shards and their index there again")


def _from_here(shard: Shard) -> Iterator[bytes]:
    try:
        with open(shard.url, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                yield block
    except OSError as error:
        raise AvtrainError(f"{shard.name} can't be read: {error.strerror or error}; was it moved or "
                           "deleted?") from error


def _from_store(shard: Shard, first: int = 0, last: int | None = None) -> Iterator[bytes]:
    """The bytes of a shard from `first` to `last`, by default to its end."""
    last = shard.size if last is None else last
    at, skipped = first, 0
    source: Iterator[bytes] | None = None

    def from_start() -> None:
        nonlocal skipped
        skipped = at

    def next_block() -> bytes:
        nonlocal source
        source = source or blocks(shard.url, at, last, from_start)
        try:
            block = next(source, None)
            if block is None:
                raise Passing(f"ended after {at} of {last} bytes")
            return block
        except Passing:
            source = None
            raise

    while at < last:
        block = patiently(shard.url, next_block)
        dropped = min(skipped, len(block))  # where a server sends all of it again
        skipped -= dropped
        block = block[dropped:dropped + last - at]
        at += len(block)
        yield block


def _part(shard: Shard, offset: int, size: int) -> bytes:
    """So many bytes of a shard."""
    if is_remote(shard.url):
        return b"".join(_from_store(shard, offset, offset + size))
    with open(shard.url, "rb") as file:
        file.seek(offset)
        return file.read(size)


class DecodedClip(NamedTuple):
    """A clip, as `clips` gives it.

    Attributes:
        key: unique in its split.
        visual: (frames, height, width, 3) uint8 RGB; None without picture.
        log_mel: (mel bands, frames) float16; None without sound.
        info: what stands in its json: labels, start_s, end_s, source and so on (shards/README.md).
    """

    key: str
    visual: NDArray[np.uint8] | None
    log_mel: NDArray[np.float16] | None
    info: dict[str, Any]


def clips(urls: str | Iterable[str], shuffle: int = 0, seed: int = 0) -> Any:
    """The clips of some folders of shards, decoded, for any loop: a webdataset pipeline, which torch's DataLoader takes
    as it is. Each process and each of its workers reads shards of its own.

    Args:
        urls: folders of splits, or their addresses (s3://, https:// ...).
        shuffle: among so many clips at a time, and the shards; 0: in the order of the shards.
        seed: of the shuffling.

    Returns:
        An iterable of `DecodedClip`, once through. One that can't be decoded is left out, with a warning.

    Raises:
        AvtrainError: as `open_folders`; and, while it is gone through, where a shard can't be had.
    """
    import webdataset as wds

    shards = list(open_folders([urls] if isinstance(urls, str) else list(urls), labelled=False).shards)
    if shuffle:
        np.random.default_rng(seed).shuffle(shards)
    stages: list[Callable[..., Any]] = [partial(iter, tuple(shards)), wds.split_by_node, wds.split_by_worker, samples]
    if shuffle:
        stages.append(wds.shuffle(shuffle, initial=shuffle, seed=seed))
    return wds.DataPipeline(*stages, wds.map(_decoded, handler=wds.warn_and_continue))


def _decoded(sample: dict[str, Any]) -> DecodedClip:
    mp4, log_mel = sample.get("mp4"), sample.get("logmel.npy")
    return DecodedClip(sample["__key__"], decode_rgb(mp4) if mp4 is not None else None,
                       decode_log_mel(log_mel) if log_mel is not None else None, json.loads(sample["json"]))
