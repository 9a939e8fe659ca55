"""Do stored clips show and sound what their sources do there?

Sources are decoded by other means than `media`'s, and compared clip by clip with what is stored: time, level, length.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path, PurePosixPath
from typing import Any

from av.error import FFmpegError

from avprep.datasets.source import name_of
from avprep.errors import AvprepError
from avprep.inspect.against.compare import picture_problems, sound_problems
from avprep.inspect.against.source import Around, decoded
from avprep.manifest import places_of, read_clips
from avprep.mirror import Shards
from avprep.progress import progress
from avprep.shards import read_index
from avprep.spec import ClipSpec


@dataclass(frozen=True)
class StoredClip:
    """A clip of a shard as its row has it; `members`: offset and size in the tar, by ending."""

    shard: Path
    key: str
    source: str
    start_s: float
    spec: ClipSpec
    members: dict[str, tuple[int, int]]
    shards: Shards

    def member(self, ending: str) -> bytes:
        """The bytes of a member; none if it is absent."""
        return self.shards.read_at(self.shard, *self.members[ending]) if ending in self.members else b""


def sample(index_path: Path, count: int, shards: Shards | None = None) -> list[StoredClip]:
    """Clips spread evenly over the rows of an index, the same ones every time; all if `count` is 0.

    Clips of shards that are missing or not of their size are passed over: `verify` names them. `shards`: that the index
    is one of, where they are not all on this machine.
    """
    index, folder = read_index(index_path), index_path.parent
    spec = ClipSpec(**{known.name: index["spec"][known.name] for known in fields(ClipSpec)})
    clips = read_clips(folder, index)
    count = min(count or clips.num_rows, clips.num_rows)
    rows = clips.take([int((number + 0.5) * clips.num_rows / count) for number in range(count)]).to_pylist()
    whole = {entry["url"] for entry in index["shardlist"] if _is_whole(folder / entry["url"], entry["filesize"])}
    return [StoredClip(folder / row["shard"], row["key"], row["source"], row["start_s"], spec, places_of(row),
                       shards or Shards(folder)) for row in rows if row["shard"] in whole]


def _is_whole(shard: Path, size: int) -> bool:
    return shard.is_file() and shard.stat().st_size == size


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
    if inside and (raw / name).is_file():
        return raw / name
    return _odd_names(raw).get(clip.source)


@lru_cache(maxsize=1)
def _odd_names(raw: Path) -> dict[str, Path]:
    """Files by the printable name that stands in samples, where that is not their own."""
    files = (Path(parent, name) for parent, _, names in os.walk(raw) for name in names)
    return {name: path for path in files if (name := name_of(path, raw)) != path.relative_to(raw).as_posix()}


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
