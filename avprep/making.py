"""A shard from its sources, by one worker: files are probed, clips made, and the tar written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from avprep import __version__
from avprep.clips import Clip, Window, make_clip, windows
from avprep.crew import Crew
from avprep.datasets.source import Source
from avprep.errors import AvprepError, Reason, SourceFailed
from avprep.manifest import clip_row
from avprep.media import ffmpeg_version
from avprep.plan import ShardTask, shuffled_rank
from avprep.probe import SAME_LENGTH_S, Media
from avprep.probing import Probed, probe_source
from avprep.progress import Count
from avprep.shards import ShardWriter
from avprep.spec import ClipSpec
from avprep.storage import Store


@dataclass(frozen=True)
class Job:
    """What the shards of a split have in common.

    Attributes:
        folder: where they go; absolute.
        scratch: where temporary files go, on a machine that has it; absolute.
        raw: where the sources lie, if that is a store.
        out: where the shards go, if that is a store; `folder` stands for it on the planner's machine.
    """

    folder: Path
    scratch: Path
    dataset: str
    split: str
    spec: ClipSpec
    timeout_s: float
    raw: Store | None = None
    out: Store | None = None

    def shard(self, number: int) -> str:
        """The name of a shard."""
        return f"{self.split}-{number:06d}.tar"

    @contextmanager
    def scratch_for(self, number: int) -> Iterator[Path]:
        """A folder for one attempt at a shard: a node given up for lost may still be at another."""
        there = self.scratch.is_dir()  # of nodes that share nothing, the planner's alone
        folder = Path(tempfile.mkdtemp(prefix=f"{number:06d}-", dir=self.scratch if there else None))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Planner:
    """What a worker on another machine compares itself with. `token`: a file that the planner just wrote."""

    versions: tuple[str, str]
    token: Path


@dataclass
class _Outcome:
    """What became of the clips of a source."""

    probed: Probed
    windows: int = 0
    written: int = 0
    failures: list[SourceFailed] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        media = self.probed.media
        failure = media if isinstance(media, SourceFailed) else next(iter(self.failures), None) or _broken_off(media)
        result = {
            "key": self.probed.source.key, "taken": self.probed.number,
            "names": [candidate.name for candidate in self.probed.source.candidates],
            "files": [found.reason.value if isinstance(found, SourceFailed) else None for found in self.probed.found],
            "failure": reason_of(failure) if failure else None,
            "clips_written": self.written, "clips_failed": len(self.failures)}
        if isinstance(media, Media) and media.promised_s is not None and not failure and (
                abs(media.promised_s - media.length_s) > SAME_LENGTH_S):
            result |= {"promised_s": round(media.promised_s, 3), "came_s": round(media.length_s, 3)}
        return result


def reason_of(failure: SourceFailed) -> dict[str, str]:
    """A failure as it stands in failures.jsonl."""
    return {"stage": failure.stage, "reason": failure.reason.value, "detail": failure.detail}


def _broken_off(media: Media) -> SourceFailed | None:
    if not media.broken_off:
        return None
    return SourceFailed("probe", Reason.TRUNCATED, f"{media.length_s:.1f} of "
                        f"{media.promised_s or media.length_s:.1f} s are there")


def make_shard(task: ShardTask, crew: Crew, count: Count, job: Job) -> dict[str, Any]:
    """Make one shard.

    Returns:
        All that the planner needs to know of it, fit for JSON: `fingerprint` of the task; `shard`, its entry in the
        index, None if not one clip could be made; `clips`, the rows of its clips; `sources`, what became of each.
    """
    outcomes: dict[str, _Outcome] = {}  # by the source's key
    rows: list[dict[str, Any]] = []
    url, shard = job.shard(task.number), None
    with (job.scratch_for(task.number) as scratch,
          closing(_windows(task, crew, count, job, scratch, outcomes)) as todo,
          closing(crew.make(partial(_make, job=job, scratch=scratch), todo)) as made,
          ShardWriter((scratch if job.out else job.folder) / url) as writer):
        for key, result in made:
            if isinstance(result, SourceFailed):
                outcomes[key].failures.append(result)
            else:
                outcomes[key].written += 1
                rows.append(clip_row(result.info, url, writer.add(result)))
            _let_go(outcomes[key], job)
            count.add()
        if rows:
            shard = writer.finish()
            if job.out:
                job.out.put(url, writer.path)
    return {"fingerprint": task.fingerprint, "shard": shard, "clips": rows,
            "sources": [outcome.to_json() for outcome in outcomes.values()]}


def make_shard_elsewhere(task: ShardTask, crew: Crew, count: Count, job: Job, planner: Planner) -> dict[str, Any]:
    """`make_shard` on another machine than the planner's, if it sees the same files and has the same programs.

    Raises:
        AvprepError: it does not.
    """
    here = os.uname().nodename
    if versions() != planner.versions:
        raise AvprepError("{} has avprep {} and ffmpeg {}, this machine {} and {}: shards would differ; install the "
                          "same".format(here, *versions(), *planner.versions))
    if job.out is None and not planner.token.exists():
        raise AvprepError(f"{here} does not see {job.folder} as this machine does: --out must lie on a file system "
                          "that all nodes share")
    paths = [candidate.path for source in task.sources for candidate in source.candidates]
    if job.raw is None and not any(path.exists() for path in paths):
        raise AvprepError(f"{here} sees none of the {len(paths)} files of a shard, such as {paths[0]}: --raw must lie "
                          "on a file system that all nodes share")
    return make_shard(task, crew, count, job)


def versions() -> tuple[str, str]:
    """Of avprep and ffmpeg, as they are here."""
    return __version__, ffmpeg_version()


def _windows(task: ShardTask, crew: Crew, count: Count, job: Job, scratch: Path,
             outcomes: dict[str, _Outcome]) -> Generator[Window, None, None]:
    def probe(source: Source) -> Probed:
        return probe_source(_brought_near(source, job.raw, scratch) if job.raw else source, crew.readers.read)

    with crew.turn:
        for probed in crew.read_ahead(probe, task.sources):
            outcome = outcomes[probed.source.key] = _Outcome(probed)
            found = _windows_of(outcome, job.spec)
            outcome.windows = len(found)
            _let_go(outcome, job)
            count.expect(len(found) - 1)  # before it was probed, it counted as one clip
            yield from found


def _brought_near(source: Source, store: Store, scratch: Path) -> Source:
    """The source with its files in a folder of its own below `scratch`: two sources may be moments of one file."""
    folder = scratch / shuffled_rank(source.key).hex()
    for candidate in source.candidates:
        store.fetch(candidate.place, folder / candidate.place)
    return source._replace(raw=folder, others=tuple(other._replace(raw=folder) for other in source.others))


def _let_go(outcome: _Outcome, job: Job) -> None:
    """Remove what was brought near for a source, when all its clips are made."""
    if job.raw and outcome.written + len(outcome.failures) >= outcome.windows:
        for candidate in outcome.probed.source.candidates:
            candidate.path.unlink(missing_ok=True)


def _windows_of(outcome: _Outcome, spec: ClipSpec) -> list[Window]:
    media = outcome.probed.media
    try:
        return [] if isinstance(media, SourceFailed) else windows(outcome.probed.taken, media, spec)
    except SourceFailed as failure:
        outcome.failures.append(failure)
        return []


def _make(window: Window, job: Job, scratch: Path) -> tuple[str, Clip | SourceFailed]:
    # Not the key itself: on a file system that takes A for a, two keys may be one name.
    path = scratch / f"{shuffled_rank(window.key).hex()}.mp4"
    try:
        return window.source.key, make_clip(window, job.spec, job.dataset, job.split, path, job.timeout_s)
    except SourceFailed as failure:
        return window.source.key, failure
