"""Listed sources -> what shares a shard. A function of the listing and of what the file system says of each file:
its size, its date, whether it may be read. No file is opened."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class ShardTask:
    """The sources of one shard, and a fingerprint of all that its bytes depend on."""

    number: int
    sources: tuple[Source, ...]
    fingerprint: str


@dataclass(frozen=True)
class FileState:
    """What the file system says of a file: size in bytes (-1: it is not there), date in ns, whether it may be read."""

    size_bytes: int
    changed_ns: int
    readable: bool


def shuffled_rank(key: str) -> bytes:
    """Sorting by this mixes classes and videos over the shards, the same way on any machine."""
    return hashlib.sha1(key.encode()).digest()


def shard_tasks(sources: Iterable[Source], spec: ClipSpec, dataset: str, split: str,
                shard_bytes: int) -> list[ShardTask]:
    """Group the sources, in shuffled order, into shards of about `shard_bytes`: all clips of a source in one."""
    groups: list[list[tuple[Source, list[FileState]]]] = []
    room = 0.0
    for source in sorted(sources, key=lambda source: shuffled_rank(source.key)):
        states = [_state_of(candidate.path) for candidate in source.candidates]
        size = _expected_bytes(source, max(state.size_bytes for state in states), spec)
        if size > room or not groups:
            groups.append([])
            room = shard_bytes
        groups[-1].append((source, states))
        room -= size
    return [ShardTask(number, tuple(source for source, _ in group), _fingerprint(group, spec, dataset, split))
            for number, group in enumerate(groups)]


def _state_of(path: Path) -> FileState:
    try:
        status = path.stat()
    except OSError:  # it is gone, or a link to nothing: its worker says so
        return FileState(-1, 0, False)
    return FileState(status.st_size, status.st_mtime_ns, os.access(path, os.R_OK))


def _expected_bytes(source: Source, file_bytes: int, spec: ClipSpec) -> float:
    sound = 2 * spec.mel_bands * spec.mel_frames / spec.segment_s
    picture = _PICTURE_BYTES_PER_S * (spec.short_side / 160) ** 2 * (spec.fps / 16) * 2 ** ((23 - spec.crf) / 6)
    length_s = max(0, file_bytes) / _FILE_BYTES_PER_S
    if source.moment_s is not None:  # one clip, whatever the file holds beside it
        length_s = min(length_s, spec.clip_s)
    clips = max(1, length_s / spec.clip_s)
    return _TAR_BYTES_PER_CLIP * clips + (sound + picture) * length_s


def _fingerprint(group: list[tuple[Source, list[FileState]]], spec: ClipSpec, dataset: str, split: str) -> str:
    content = [FORMAT_VERSION, __version__, ffmpeg_version(), spec.to_json(), dataset, split, [
        [source.key, source.moment_s, source.labels, source.label_times_s, [
            [candidate.name, list(vars(state).values())]
            for candidate, state in zip(source.candidates, states, strict=True)]]
        for source, states in group]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def plan_digest(tasks: Iterable[ShardTask]) -> str:
    """Of what shares a shard, and under which names and labels; the same on every machine that sees the same files."""
    digest = hashlib.sha256()
    for task in tasks:
        for source in task.sources:
            names = [candidate.name for candidate in source.candidates]
            digest.update(repr((task.number, source.key, names, source.labels, source.moment_s, source.label_times_s))
                          .encode())
    return digest.hexdigest()
