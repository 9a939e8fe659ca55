"""Raw videos to shards: plan -> clips -> tars -> index and report."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from avprep.account import SplitReport, account, reason_of, write_index
from avprep.clips import Clip, Window, make_clip, windows
from avprep.datasets import DATASETS, list_split
from avprep.datasets.folder import SPLIT_NAMES
from avprep.errors import AvprepError, NothingToBuild, SourceFailed
from avprep.executors import EXECUTORS
from avprep.plan import ShardTask, shard_tasks, shuffled_rank
from avprep.probe import Media
from avprep.probing import probe_all
from avprep.progress import progress
from avprep.shards import INDEX, ShardWriter, write_whole
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
    folder = options.out / options.dataset / split
    state = folder / ".build"
    with _only_builder(state):
        if options.force:
            for path in [folder / INDEX, *state.glob(f"{split}-*.json"), state / "probes.jsonl"]:
                path.unlink(missing_ok=True)
        sources, media, left = probe_all(listed, state / "probes.jsonl", options.workers)
        listing.skipped += left
        tasks = shard_tasks((window for source, found in zip(sources, media, strict=True) if isinstance(found, Media)
                             for window in windows(source, found, options.spec)),
                            options.spec, options.dataset, split, options.shard_bytes)
        markers = {task.number: marker for task in tasks if (marker := _marker_if_done(folder, split, task))}
        todo = [task for task in tasks if task.number not in markers]
        if todo:
            (folder / INDEX).unlink(missing_ok=True)  # it would not fit the shards for a while
            for task, marker in _write_shards(todo, folder, split, options):
                markers[task.number] = marker
        _remove_stale(folder, split, markers)
        done = [markers[task.number] for task in tasks]
        report = account(folder, sources, media, listing, done)
        write_index(folder, options.dataset, split, options.spec, listing, done, report)
    report.new_clips_s = sum(clip["length_s"] for task in todo for clip in markers[task.number]["clips"])
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


def _make(window: Window, spec: ClipSpec, dataset: str, split: str, scratch: Path,
          timeout_s: float) -> Clip | SourceFailed:
    try:
        # Not the key itself: on a file system that takes A for a, two keys may be one name.
        return make_clip(window, spec, dataset, split, scratch / f"{shuffled_rank(window.key).hex()}.mp4", timeout_s)
    except SourceFailed as failure:
        return failure


def _write_shards(tasks: list[ShardTask], folder: Path, split: str,
                  options: BuildOptions) -> Iterator[tuple[ShardTask, dict[str, Any]]]:
    """Make the clips of all these shards in one stream, and cut the stream into tars."""
    make = partial(_make, spec=options.spec, dataset=options.dataset, split=split,
                   scratch=folder.absolute() / ".build" / "scratch", timeout_s=options.timeout_s)
    todo = [window for task in tasks for window in task.windows]
    results = progress(EXECUTORS[options.executor](make, todo, options.workers), f"build {split}", "clip", len(todo))
    for task in tasks:
        marker_path = _marker_path(folder, split, task.number)
        shard = None
        entries: list[dict[str, Any]] = []
        failures: list[dict[str, Any]] = []
        with ShardWriter(folder / f"{split}-{task.number:06d}.tar") as writer:
            for window, result in zip(task.windows, results, strict=False):
                if isinstance(result, SourceFailed):
                    failures.append({"source": window.source.key, "path": window.source.name, **reason_of(result)})
                else:
                    writer.add(result)
                    entries.append({"source": window.source.key, "labels": result.info["labels"],
                                    "length_s": round(result.info["end_s"] - window.start_s, 4),
                                    "missing": result.info["missing"], "marks": result.info["marks"]})
            if entries:
                marker_path.unlink(missing_ok=True)  # a kill after finish() must not leave it to vouch for this tar
                shard = writer.finish()
        marker = {"fingerprint": task.fingerprint, "shard": shard, "clips": entries, "failures": failures}
        write_whole(marker_path, json.dumps(marker))
        yield task, marker
    next(results, None)  # lets the progress bar end at its total


def _marker_path(folder: Path, split: str, number: int) -> Path:
    return folder / ".build" / f"{split}-{number:06d}.json"


def _marker_if_done(folder: Path, split: str, task: ShardTask) -> dict[str, Any] | None:
    """The marker that is written after a shard, if it is of this very task and the shard is still there."""
    try:
        marker: dict[str, Any] = json.loads(_marker_path(folder, split, task.number).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if marker["fingerprint"] != task.fingerprint:
        return None
    shard = marker["shard"]
    path = folder / shard["url"] if shard else None
    if path and not (path.is_file() and path.stat().st_size == shard["filesize"]):
        return None
    return marker


def _remove_stale(folder: Path, split: str, markers: dict[int, dict[str, Any]]) -> None:
    """Remove tars and markers that are not of this build: whoever globs would read them along.

    Goes by what is on disk: `--force` deletes the markers first, and a shard all of whose clips fail has no tar now.
    """
    kept = {_marker_path(folder, split, number) for number in markers}
    kept |= {folder / marker["shard"]["url"] for marker in markers.values() if marker["shard"]}
    for path in [*folder.glob(f"{split}-[0-9]*.tar"), *(folder / ".build").glob(f"{split}-[0-9]*.json")]:
        if path not in kept:
            path.unlink()
