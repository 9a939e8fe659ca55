"""Do stored clips show and sound what their sources do there?

Sources are decoded by other means than `media`'s, and compared clip by clip with what is stored: time, level, length.
"""

from __future__ import annotations

import itertools
import json
import signal
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path, PurePosixPath
from typing import Any

from av.error import FFmpegError

from avprep.errors import AvprepError
from avprep.inspect.against.compare import picture_problems, sound_problems
from avprep.inspect.against.source import Around, decoded
from avprep.progress import progress
from avprep.shards import read_index
from avprep.spec import ClipSpec


@dataclass(frozen=True)
class StoredClip:
    """A clip of a shard: what its json claims, and where its members lie in the tar (offset and size by ending)."""

    shard: Path
    key: str
    source: str
    start_s: float
    spec: ClipSpec
    members: dict[str, tuple[int, int]]

    def member(self, ending: str) -> bytes:
        """The bytes of a member; none if it is absent."""
        return _read(self.shard, *self.members.get(ending, (0, 0)))


def _read(shard: Path, offset: int, size: int) -> bytes:
    with shard.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def sample(index_path: Path, count: int) -> list[StoredClip]:
    """Clips spread evenly over the shards of an index, the same ones every time; all if `count` is 0.

    Damaged shards and samples are passed over: `verify` names them.
    """
    shards = read_index(index_path)["shardlist"]
    total = sum(entry["nsamples"] for entry in shards)
    count = min(count or total, total)
    wanted = {int((number + 0.5) * total / count) for number in range(count)}
    found: list[StoredClip] = []
    first = 0
    for entry in shards:
        numbers = {number for number in range(entry["nsamples"]) if first + number in wanted}
        first += entry["nsamples"]
        try:
            found += _clips_of(index_path.parent / entry["url"], numbers)
        except (tarfile.TarError, OSError, AvprepError, KeyError, TypeError, ValueError):
            continue
    return found


def _clips_of(shard: Path, numbers: set[int]) -> Iterator[StoredClip]:
    with tarfile.open(shard, "r:") as tar:
        samples = itertools.groupby(tar, lambda member: member.name.partition(".")[0])
        for number, (key, members) in enumerate(samples):
            places = {member.name.partition(".")[2]: (member.offset_data, member.size) for member in members}
            if number in numbers:
                info = json.loads(_read(shard, *places["json"]))
                spec = ClipSpec(**{known.name: info["spec"][known.name] for known in fields(ClipSpec)})
                yield StoredClip(shard, key, info["source"], float(info["start_s"]), spec, places)


def differences(clips: list[StoredClip], raw: Path) -> Iterator[str]:
    """Compare clips with their sources below `raw`; yields one line a problem.

    Raises:
        AvprepError: there is none of the sources.
    """
    ordered = sorted(clips, key=lambda clip: (clip.source, clip.start_s))
    if clips and not any(_path_of(clip, raw) for clip in clips):
        raise AvprepError(f"{raw} has none of the sources, such as {ordered[0].source}: name the folder that "
                          "was given to `avprep build` as --raw")
    for clip, problems in progress(_compared(ordered, raw), "compare", "clip", len(ordered)):
        for problem in problems:
            yield f"{clip.shard}: {clip.key}: {problem}, source {clip.source}"


def _path_of(clip: StoredClip, raw: Path) -> Path | None:
    name = PurePosixPath(clip.source)
    inside = not name.is_absolute() and ".." not in name.parts  # shards may be a stranger's
    return raw / name if inside and (raw / name).is_file() else None


def _compared(ordered: list[StoredClip], raw: Path) -> Iterator[tuple[StoredClip, list[str]]]:
    """Each clip and its problems. Files are decoded in another process: one that crashes it costs its own clips."""
    child: tuple[BaseProcess, Any] | None = None
    try:
        for _, group in itertools.groupby(ordered, lambda clip: clip.source):
            clips = list(group)
            path = _path_of(clips[0], raw)
            if path is None:
                yield from ((clip, [f"its source is not in {raw}"]) for clip in clips)
                continue
            child = child or _start_child()
            try:
                child[1].send((path, clips))
                problems = child[1].recv()
            except (EOFError, ConnectionError):
                child, problems = None, [["its source crashes the decoder"]] * len(clips)
            yield from zip(clips, problems, strict=True)
    finally:
        if child:
            child[0].kill()


def _start_child() -> tuple[BaseProcess, Any]:
    """A process that answers (path, clips) with their problems, and the pipe to it."""
    context = get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_serve, args=(its, _problems_of_source), daemon=True)
    process.start()
    its.close()  # its death then ends the pipe
    return process, ours


def _serve(pipe: Any, problems_of_source: Callable[[Path, list[StoredClip]], list[list[str]]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and that ends this
    while True:
        try:
            path, clips = pipe.recv()
        except EOFError:
            return
        pipe.send(problems_of_source(path, clips))


def _problems_of_source(path: Path, clips: list[StoredClip]) -> list[list[str]]:
    """The problems of each of a file's clips, which come in the order of their time."""
    found: list[list[str]] = []
    try:
        for clip, around in zip(clips, decoded(path, [Around(clip.spec, clip.start_s) for clip in clips]), strict=True):
            found.append([*picture_problems(around, clip.member("mp4")),
                          *sound_problems(around, clip.member("logmel.npy"))])
    except (FFmpegError, OSError, ValueError) as error:
        problem = f"its source can't be decoded: {getattr(error, 'strerror', None) or error}"
        found += [[problem]] * (len(clips) - len(found))
    return found
