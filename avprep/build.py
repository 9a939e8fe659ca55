"""Raw videos to shards: listing -> plan -> a worker a shard -> tables, index and report."""

from __future__ import annotations

import gc
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from avprep import state
from avprep.account import ShardDone, SplitReport, account_of, settle
from avprep.cluster import ray_cluster, run_ray, task_cores
from avprep.datasets import DATASETS, list_split
from avprep.datasets.folder import SPLIT_NAMES
from avprep.datasets.source import UNUSABLE_NAME, Listing, Skipped, printable
from avprep.errors import AvprepError, NothingToBuild
from avprep.executors import run_local
from avprep.finished import digest_of, if_finished, note_finished
from avprep.lease import leased
from avprep.making import Job, Planner, make_shard, make_shard_elsewhere, versions
from avprep.mirror import Mirror, build_mirror, named
from avprep.parts import forget_parts, note_part
from avprep.plan import ShardTask, shard_tasks
from avprep.progress import Count
from avprep.spec import FORMAT_VERSION, ClipSpec
from avprep.state import WHOLE, Part
from avprep.storage import Store

# Tasks -> what `make_shard` says of each, as they come.
_Run = Callable[[list[ShardTask], Count], Generator[dict[str, Any], None, None]]


@dataclass(frozen=True)
class BuildOptions:
    """What `avprep build` was asked for.

    Attributes:
        workers: clips made at the same time, on Ray by each shard's task; None: as many as there are cores.
        limit: at most so many sources a split; None: all.
        part: only this range of the shards, without index and tables; None: all of them.
        raw_store: the store that `raw` stands for, if it is a `raw_mirror`.
        out_store: the store that shards go to, in place of `out`.
        unusable: names in the raw store that no file can have.
    """

    dataset: str
    raw: Path
    out: Path
    spec: ClipSpec
    workers: int | None
    shard_bytes: int
    timeout_s: float
    limit: int | None = None
    force: bool = False
    executor: str = "local"
    ray_address: str | None = None
    part: Part | None = None
    raw_store: Store | None = None
    out_store: Store | None = None
    unusable: tuple[str, ...] = ()


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


@dataclass(frozen=True)
class Plan:
    """What a split lists, and the shards it is made into."""

    listing: Listing
    tasks: list[ShardTask]


def plan_split(options: BuildOptions, split: str) -> Plan:
    """List a split, and group its sources into shards.

    Raises:
        NothingToBuild: there is not one file to try.
        AvprepError: a list is missing or not of its kind.
    """
    gc.disable()  # it would walk millions of tuples again and again, and find no circle
    try:
        listing = list_split(options.dataset, options.raw.absolute(), split)
        if not listing.sources:
            skipped = Counter(entry.reason for entry in listing.skipped)
            looked = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "the folder holds none"
            raise NothingToBuild(f"no media files of {options.dataset} {split} in {options.raw} ({looked}). "
                                 f"Lay them out: {DATASETS[options.dataset].layout}")
        tasks = shard_tasks(listing.sources, options.spec, options.dataset, split, options.shard_bytes, options.limit)
        listing.sources = []
        listing.skipped += [Skipped(printable(name), UNUSABLE_NAME) for name in options.unusable]
        return Plan(listing, tasks)
    finally:
        gc.enable()


def build_split(options: BuildOptions, split: str) -> SplitReport:
    """Build one split into `OUT/DATASET/SPLIT/`, or a part of it, doing only what an earlier run left undone.

    Raises:
        NothingToBuild: there is not one file to try.
        AvprepError: a list is missing or not of its kind, or the folder is in use by another build.
    """
    started = time.monotonic()
    if options.out_store is None:
        report = _build_in((options.out / options.dataset / split).absolute(), options, split, None)
        report.folder = options.out / options.dataset / split
    else:
        store = options.out_store.below(options.dataset, split)
        with leased(store, options.part or WHOLE) as lease, build_mirror(store, lease.check) as mirror:
            report = _build_in(mirror.folder, options, split, mirror)
        report.folder = store.address
    report.elapsed_s = time.monotonic() - started
    return report


def _build_in(folder: Path, options: BuildOptions, split: str, mirror: Mirror | None) -> SplitReport:
    """`build_split` in a folder of this machine. `mirror`: of the store that the folder stands for."""
    part = options.part or WHOLE
    raw = digest_of(options.raw.absolute()) if options.part is None else ""
    settings = _settings(options, split)
    report = None if options.force or options.part else if_finished(folder, settings, raw)
    if report is None:
        job = Job(folder, state.scratch_of(folder, part), options.dataset, split, options.spec, options.timeout_s,
                  options.raw_store, mirror.store if mirror else None)
        with named(options.raw.absolute(), options.raw_store):
            plan = plan_split(options, split)
        with state.only_builder(folder, part):
            report = _build(job, options, part, plan, mirror)
            if mirror:
                mirror.push()
                mirror.pull(contents=False)  # the note goes by what the store says of the files
            if options.part is None:
                note_finished(folder, settings, raw, report)
            if mirror:
                mirror.push()
    return report


def _settings(options: BuildOptions, split: str) -> dict[str, Any]:
    """All that decides the bytes of a build, beside the raw files."""
    avprep, ffmpeg = versions()
    return {"dataset": options.dataset, "split": split, "format": FORMAT_VERSION, "avprep": avprep, "ffmpeg": ffmpeg,
            "shard_bytes": options.shard_bytes, "limit": options.limit, **asdict(options.spec)}


def _build(job: Job, options: BuildOptions, part: Part, plan: Plan, mirror: Mirror | None) -> SplitReport:
    count = len(plan.tasks)
    own = [plan.tasks[number] for number in part.within(count)]
    state.remove_left_over(job, part, count)
    if options.force:
        state.forget(job, [task.number for task in own])
    done = {task.number: shard for task in own if (shard := state.if_done(job, task.number, task.fingerprint))}
    todo = [task for task in own if task.number not in done]
    if todo:
        forget_parts(job.folder, options.part)
    for task, shard in _make_shards(todo, job, options, mirror):
        done[task.number] = shard
    state.remove_left_over(job, part, count)  # of workers that were lost
    state.remove_stale(job, done, part, count)
    report = _conclude(job, options, plan, [done[task.number] for task in own])
    report.new_clips_s = sum(done[task.number].clips_s for task in todo)
    return report


def _conclude(job: Job, options: BuildOptions, plan: Plan, done: list[ShardDone]) -> SplitReport:
    """Write what is written last: the index; of a part, what `merge` needs to know of it."""
    if options.part is None:
        forget_parts(job.folder)
        return settle(job.folder, job.dataset, job.split, job.spec, plan.listing, done, versions())
    note_part(job, options.part, _settings(options, job.split), plan.listing, plan.tasks)
    return account_of(job.folder, [], done)


def _make_shards(tasks: list[ShardTask], job: Job, options: BuildOptions,
                 mirror: Mirror | None) -> Iterator[tuple[ShardTask, ShardDone]]:
    """Make shards, and write a marker after each; as they come."""
    if not tasks:
        return
    state.forget(job, [task.number for task in tasks])  # a marker must not vouch for another tar of the same size
    if mirror:
        mirror.push()
    by_fingerprint, clips = {task.fingerprint: task for task in tasks}, 0
    expected = sum(len(task.sources) for task in tasks)
    with _executor(job, options) as run, Count(f"build {job.split}", "clip", expected) as count, closing(
            run(tasks, count)) as results:
        for made in results:
            task = by_fingerprint[made["fingerprint"]]
            if mirror and made["shard"]:
                mirror.add_shard(made["shard"]["url"], made["shard"]["filesize"])
            state.note_done(job, task, made)
            if mirror:
                mirror.push()
            clips += sum(source["clips_written"] + source["clips_failed"] for source in made["sources"])
            count.at_least(clips)
            yield task, ShardDone.from_json(made)


@contextmanager
def _executor(job: Job, options: BuildOptions) -> Iterator[_Run]:
    """Who makes the shards."""
    if options.executor == "local":
        yield partial(run_local, partial(make_shard, job=job), workers=options.workers or os.cpu_count() or 1)
        return
    planner = Planner(versions(), job.folder / ".build" / f"planner-{uuid.uuid4().hex}")
    planner.token.touch()
    try:
        with ray_cluster(options.ray_address) as ray:
            make = partial(make_shard_elsewhere, job=job, planner=planner)
            yield partial(run_ray, ray, make, cores=task_cores(ray, options.workers))
    finally:
        planner.token.unlink(missing_ok=True)
