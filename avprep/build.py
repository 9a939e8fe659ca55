"""Raw videos to shards: listing -> plan -> a worker a shard -> tables, index and report."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from avprep.account import ShardDone, SplitReport, settle
from avprep.datasets import DATASETS, list_split
from avprep.datasets.folder import SPLIT_NAMES
from avprep.errors import AvprepError, NothingToBuild
from avprep.executors import EXECUTORS
from avprep.making import Job, make_shard
from avprep.plan import ShardTask, shard_tasks, shuffled_rank
from avprep.progress import Count
from avprep.shards import INDEX, write_whole
from avprep.spec import ClipSpec


@dataclass(frozen=True)
class BuildOptions:
    """What `avprep build` was asked for. `limit`: at most so many sources a split; None: all."""

    dataset: str
    raw: Path
    out: Path
    spec: ClipSpec
    workers: int
    shard_bytes: int
    timeout_s: float
    limit: int | None = None
    force: bool = False
    executor: str = "local"


def check_raw(dataset: str, raw: Path) -> None:
    """Refuse a raw folder that is not there.

    Raises:
        AvprepError: says what was looked for, where to get it, how to lay it out, and what needs nothing.
    """
    if not raw.is_dir():
        known = DATASETS[dataset]
        raise AvprepError(f"no folder {raw} with the raw files of {dataset} (--raw). Get them: {known.origin}. "
                          f"Lay them out: {known.layout}. To try without any download: avprep build --dataset demo")


def choose_splits(dataset: str, raw: Path, split: str) -> list[str]:
    """The splits that `--split` names: one, or all that are there.

    Raises:
        AvprepError: the dataset has no such split.
    """
    there = DATASETS[dataset].splits(raw)
    if split != "all":
        if there and split not in there:
            raise AvprepError(f"--split {split}: {dataset} in {raw} has {', '.join(there)}; or say --split all"
                              + _did_you_mean(split, there))
        return [split]
    if not there:
        raise AvprepError(f"no split of {dataset} found in {raw}. Lay it out: {DATASETS[dataset].layout}")
    return list(there)


def _did_you_mean(split: str, there: tuple[str, ...]) -> str:
    other_name = next((name for name, others in SPLIT_NAMES.items() if split.lower() in others), split)
    nearest = [name for name in there if name.startswith(other_name)] or get_close_matches(other_name, there, 1)
    return f" (did you mean {nearest[0]}?)" if nearest else ""


def build_split(options: BuildOptions, split: str) -> SplitReport:
    """Build one split into `OUT/DATASET/SPLIT/`, doing only what an earlier run left undone.

    Raises:
        NothingToBuild: there is not one file to try.
        AvprepError: a list is missing or not of its kind, or the folder is in use by another build.
    """
    started = time.monotonic()
    listing = list_split(options.dataset, options.raw.absolute(), split)
    listed = sorted(listing.sources, key=lambda source: shuffled_rank(source.key))[: options.limit]
    if not listed:
        skipped = Counter(entry.reason for entry in listing.skipped)
        looked = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "the folder holds none"
        raise NothingToBuild(f"no media files of {options.dataset} {split} in {options.raw} ({looked}). "
                             f"Lay them out: {DATASETS[options.dataset].layout}")
    job = Job((options.out / options.dataset / split).absolute(), options.dataset, split, options.spec,
              options.timeout_s)
    state = job.folder / ".build"
    with _only_builder(state):
        if options.force:
            for path in [job.folder / INDEX, *state.glob(f"{split}-*.json")]:
                path.unlink(missing_ok=True)
        tasks = shard_tasks(listed, options.spec, options.dataset, split, options.shard_bytes)
        done = {task.number: shard for task in tasks if (shard := _if_done(job, task))}
        todo = [task for task in tasks if task.number not in done]
        for task, shard in _make_shards(todo, job, options):
            done[task.number] = shard
        _remove_stale(job, done)
        report = settle(job.folder, options.dataset, split, options.spec, listing, listed,
                        [done[task.number] for task in tasks])
    report.folder = options.out / options.dataset / split
    report.new_clips_s = sum(done[task.number].clips_s for task in todo)
    report.elapsed_s = time.monotonic() - started
    return report


@contextmanager
def _only_builder(state: Path) -> Iterator[None]:
    """Hold the folder's lock; the system releases it however this process ends."""
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AvprepError(f"another avprep build is writing to {state.parent}: wait for it, or stop it") from error
        shutil.rmtree(state / "scratch", ignore_errors=True)
        (state / "scratch").mkdir()
        for part in [*state.glob("*.part"), *state.parent.glob("*.part")]:
            part.unlink()
        yield
        shutil.rmtree(state / "scratch")


def _make_shards(tasks: list[ShardTask], job: Job, options: BuildOptions) -> Iterator[tuple[ShardTask, ShardDone]]:
    """Make shards, and write a marker after each; as they come."""
    if not tasks:
        return
    (job.folder / INDEX).unlink(missing_ok=True)  # it would not fit the shards for a while
    for task in tasks:
        _marker(job, task.number).unlink(missing_ok=True)  # it must not vouch for another tar of the same size
    by_fingerprint = {task.fingerprint: task for task in tasks}
    make, clips = partial(make_shard, job=job), 0
    with Count(f"build {job.split}", "clip", sum(len(task.sources) for task in tasks)) as count, closing(
            EXECUTORS[options.executor](make, tasks, options.workers, count)) as results:
        for made in results:
            task = by_fingerprint[made["fingerprint"]]
            write_whole(_marker(job, task.number), json.dumps(made).encode())
            clips += sum(source["clips_written"] + source["clips_failed"] for source in made["sources"])
            count.at_least(clips)
            yield task, ShardDone.from_json(made)


def _marker(job: Job, number: int) -> Path:
    return job.folder / ".build" / f"{job.split}-{number:06d}.json"


def _if_done(job: Job, task: ShardTask) -> ShardDone | None:
    """What the marker says that is written after a shard, if it is of this very task and the shard is still there."""
    try:
        made: dict[str, Any] = json.loads(_marker(job, task.number).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if made.get("fingerprint") != task.fingerprint:
        return None
    done = ShardDone.from_json(made)
    path = job.folder / done.shard["url"] if done.shard else None
    if done.shard and path and not (path.is_file() and path.stat().st_size == done.shard["filesize"]):
        return None
    return done


def _remove_stale(job: Job, done: dict[int, ShardDone]) -> None:
    """Remove tars and markers that are not of this build: whoever globs would read them along. And what earlier
    versions left.

    Goes by what is on disk: `--force` deletes the markers first, and a shard all of whose clips fail has no tar now.
    """
    kept = {_marker(job, number) for number in done}
    kept |= {job.folder / shard.shard["url"] for shard in done.values() if shard.shard}
    state = job.folder / ".build"
    for path in [*job.folder.glob(f"{job.split}-[0-9]*.tar"), *state.glob(f"{job.split}-[0-9]*.json")]:
        if path not in kept:
            path.unlink()
    for path in (state / "probes.jsonl", job.folder / "skipped.jsonl", job.folder / "remarks.jsonl"):
        path.unlink(missing_ok=True)
