"""Clips a second that `avprep build` makes: by this machine or a Ray cluster on it, between folders or in a store."""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avprep.cli import main as avprep
from avprep.demo import make_demo

MOST_RAY = 1.15  # times the local executor's seconds
_SHARD_MB = 1.0  # a few clips: several shards for each core, so that none waits long for the last


@dataclass(frozen=True)
class Way:
    """A way to build. `workers`: clips at the same time; on Ray as many tasks, of a core each."""

    executor: str
    workers: int
    where: str

    def __str__(self) -> str:
        return f"{self.executor}, {self.workers}, {self.where}"


@dataclass
class Built:
    """What was measured of a way: seconds of each round."""

    clips: int
    rounds: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.rounds)


def measure(clips: int, rounds: int, few_clips: int, scratch: Path) -> dict[Way, Built]:
    """Build the same videos in all ways. What Ray is compared with, 2 workers between folders, is done `rounds` times
    in turn; all else once. Before the clock runs, Ray's cluster is there and each way has made `few_clips`, if any.
    """
    videos, few = scratch / "videos", scratch / "few"
    for folder, count in ((videos, clips), (few, few_clips)):
        if count:
            make_demo(folder, os.cpu_count() or 1, {"train": count})
    found: dict[Way, Built] = {}
    with _store(videos, few) as options:
        for workers in (1, 2):
            with _ray(workers):
                for where in ("folder", "store"):
                    ways = [Way(executor, workers, where) for executor in ("local", "ray")]
                    of_this = rounds if (workers, where) == (2, "folder") else 1
                    for number in range(0 if few_clips else 1, of_this + 1):
                        for way in ways:
                            out = scratch / f"{way}-{number}".replace(", ", "-")
                            built = _seconds(way, videos if number else few, out, options)
                            if number:  # the first is to warm up
                                found.setdefault(way, Built(clips)).rounds.append(built)
    return found


def _seconds(way: Way, raw: Path, out: Path, options: str) -> float:
    """Of a build, which must make all clips."""
    places = [str(raw), str(out)] if way.where == "folder" else [f"s3://bucket/{raw.name}", f"s3://bucket/{out.name}"]
    executor = ["--executor", "ray", "--workers", "1"] if way.executor == "ray" else ["--workers", str(way.workers)]
    printed = io.StringIO()
    start = time.perf_counter()
    with redirect_stdout(printed):
        avprep(["build", "--dataset", "demo", "--raw", places[0], "--out", places[1], "--shard-mb", str(_SHARD_MB),
                "--storage-options", options, *executor], standalone_mode=False)
    seconds = time.perf_counter() - start
    count = len(list(raw.rglob("*.mp4")))
    assert f"{count} files found = {count} written" in printed.getvalue(), printed.getvalue()
    return seconds


@contextmanager
def _ray(cores: int) -> Iterator[None]:
    """A Ray cluster of so many cores."""
    import ray

    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False,
             runtime_env={"env_vars": {"OPENBLAS_NUM_THREADS": "1"}})
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _store(*folders: Path) -> Iterator[str]:
    """An S3 server (moto's) on this machine, in a process of its own, that has these folders in a bucket: what
    `--storage-options` says of it."""
    import fsspec

    code = ("import time; from moto.server import ThreadedMotoServer\n"
            "server = ThreadedMotoServer('127.0.0.1', 0, verbose=False); server.start()\n"
            "print(server.get_host_and_port()[1], flush=True); time.sleep(36000)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True) as process:
        try:
            assert process.stdout is not None
            options: dict[str, Any] = {"key": "key", "secret": "word", "client_kwargs": {
                "endpoint_url": f"http://127.0.0.1:{int(process.stdout.readline())}"}}
            store = fsspec.filesystem("s3", **options)
            store.mkdir("bucket")
            for folder in folders:
                for path in folder.rglob("*.mp4"):
                    store.pipe_file(f"bucket/{folder.name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
            yield json.dumps(options)
        finally:
            process.kill()
