"""Listed sources -> what shares a shard. A function of the listing and of what the file system says of each file:
its size, its date, whether it may be read. No file is opened."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from avprep import __version__
from avprep.datasets.source import Source
from avprep.media import ffmpeg_version
from avprep.spec import FORMAT_VERSION, ClipSpec

# Seen on the videos of tests and README at short side 160, 16 fps, crf 23: 2 to 22 kB a second.
_PICTURE_BYTES_PER_S = 18_000
_TAR_BYTES_PER_CLIP = 4_000
# A file tells its size, not its length: taken for a video of Kinetics' size and rate. Films in high resolution give
# smaller shards than asked for, speech at a few kilobytes a second gives larger ones.
_FILE_BYTES_PER_S = 60_000
_READ = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH


@dataclass(frozen=True)
class ShardTask:
    """The sources of one shard, and a fingerprint of all that its bytes depend on."""

    number: int
    sources: tuple[Source, ...]
    fingerprint: str


# What the file system says of a file: size in bytes (-1: it is not there), date in ns, whether it may be read.
_FileState = tuple[int, int, bool]


def shuffled_rank(key: str) -> bytes:
    """Sorting by this mixes classes and videos over the shards, the same way on any machine."""
    return hashlib.sha1(key.encode()).digest()


def shard_tasks(sources: Iterable[Source], spec: ClipSpec, dataset: str, split: str,
                shard_bytes: int, limit: int | None = None) -> list[ShardTask]:
    """Group the sources, in shuffled order, into shards of about `shard_bytes`: all clips of a source in one.

    `limit`: no more than so many sources.
    """
    common = json.dumps([FORMAT_VERSION, __version__, ffmpeg_version(), spec.to_json(), dataset, split])
    bytes_per_s, clip_s = _bytes_per_s(spec), spec.clip_s
    tasks: list[ShardTask] = []
    group: list[Source] = []
    lines: list[str] = []
    room, raw, root = 0.0, None, ""
    for source in sorted(sources, key=lambda source: shuffled_rank(source.key))[:limit]:
        if source.raw is not raw:
            raw, root = source.raw, str(source.raw)
        states = [_state_of(f"{root}/{place}") for place in
                  (source.place, *[other.place for other in source.others])]
        size = _expected_bytes(source, max(states)[0], clip_s, bytes_per_s)
        if size > room:
            if group:
                tasks.append(ShardTask(len(tasks), tuple(group), _fingerprint(common, lines)))
            group, lines, room = [], [], float(shard_bytes)
        group.append(source)
        lines.append(_line(source, states))
        room -= size
    if group:
        tasks.append(ShardTask(len(tasks), tuple(group), _fingerprint(common, lines)))
    return tasks


def _state_of(path: str) -> _FileState:
    try:
        status = os.stat(path)
    except OSError:  # it is gone, or a link to nothing: its worker says so
        return -1, 0, False
    return status.st_size, status.st_mtime_ns, status.st_mode & _READ == _READ or os.access(path, os.R_OK)


def _bytes_per_s(spec: ClipSpec) -> float:
    """Of a clip, about."""
    sound = 2 * spec.mel_bands * spec.mel_frames / spec.segment_s
    return sound + _PICTURE_BYTES_PER_S * (spec.short_side / 160) ** 2 * (spec.fps / 16) * 2 ** ((23 - spec.crf) / 6)


def _expected_bytes(source: Source, file_bytes: int, clip_s: float, bytes_per_s: float) -> float:
    length_s = max(0, file_bytes) / _FILE_BYTES_PER_S
    if source.moment_s is not None:  # one clip, whatever the file holds beside it
        length_s = min(length_s, clip_s)
    return _TAR_BYTES_PER_CLIP * max(1, length_s / clip_s) + bytes_per_s * length_s


def _line(source: Source, states: list[_FileState]) -> str:
    """A source in the text of a fingerprint. Whoever changes it has every finished shard made anew."""
    found = ", ".join([f"FileState(size_bytes={size}, changed_ns={date}, readable={readable})"
                       for size, date, readable in states])
    others = "".join([f", {other.name!r}" for other in source.others]) if source.others else ""
    return (f"({source.key!r}, {source.moment_s!r}, {source.labels!r}, {source.label_times_s!r}, "
            f"{source.name!r}, {found}{others})")


def _fingerprint(common: str, lines: list[str]) -> str:
    return hashlib.sha256("\n".join([common, *lines]).encode()).hexdigest()


def plan_digest(tasks: Iterable[ShardTask]) -> str:
    """Of what shares a shard, and under which names and labels; the same on every machine that sees the same files."""
    digest = hashlib.sha256()
    for task in tasks:
        for source in task.sources:
            names = [candidate.name for candidate in source.candidates]
            digest.update(repr((task.number, source.key, names, source.labels, source.moment_s, source.label_times_s))
                          .encode())
    return digest.hexdigest()
