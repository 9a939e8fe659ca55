"""Planning, and running a finished build again, against rows of the list.

The list is made up, in Kinetics' form; its files are stubs, sparse and all in one folder; shards are made by a stand-in
that writes a small file for each, with the rows that real clips would have.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CLASSES = 700
_FILE_BYTES = 1_500_000
_MOST_PLAN_S, _MOST_PLAN_MB, _MOST_AGAIN_S = 10.0, 500.0, 5.0
PROMISED = f"a plan in {_MOST_PLAN_S:g} s and {_MOST_PLAN_MB:g} MB, again in {_MOST_AGAIN_S:g} s"
_PLAN = """
import sys
from pathlib import Path
from avprep.build import BuildOptions, plan_split
from avprep.spec import ClipSpec
options = BuildOptions("kinetics700", Path(sys.argv[1]), Path("none"), ClipSpec(), 2, 256_000_000, 60)
print(len(plan_split(options, "train").tasks))
"""
_BUILD = """
import sys
from pathlib import Path
import avprep.build
from avprep.spec import ClipSpec
from benchmarks.planning import stand_in
avprep.build.make_shard = stand_in
options = avprep.build.BuildOptions("kinetics700", Path(sys.argv[1]), Path(sys.argv[2]), ClipSpec(), 2, 256_000_000, 60)
print(avprep.build.build_split(options, "train").clips)
"""


@dataclass(frozen=True)
class Planned:
    """Of a list: seconds, from the start of a process to its end, to plan it, to make all shards with a stand-in, and
    to find that nothing is left to do; MB of memory of the planner at the most."""

    rows: int
    plan_s: float
    plan_mb: float
    first_s: float
    again_s: float

    @property
    def is_kept(self) -> bool:
        """Whether it is as promised."""
        return self.plan_s <= _MOST_PLAN_S and self.plan_mb <= _MOST_PLAN_MB and self.again_s <= _MOST_AGAIN_S


@dataclass(frozen=True)
class _Run:
    """Of a process: seconds, from its start to its end; MB of memory at the most; what it printed."""

    seconds: float
    mb: float
    printed: str


def planned(rows: int) -> Planned:
    """Measure with a list of so many rows."""
    with tempfile.TemporaryDirectory() as scratch:
        raw, out = Path(scratch) / "raw", Path(scratch) / "out"
        make_list(raw, rows)
        plan = _measured([sys.executable, "-c", _PLAN, str(raw)])
        first = _measured([sys.executable, "-c", _BUILD, str(raw), str(out)])
        again = _measured([sys.executable, "-m", "avprep.cli", "build", "--raw", str(raw), "--out", str(out)])
    assert first.printed.strip() == str(rows) and "all shards were there already" in again.printed, again.printed
    return Planned(rows, plan.seconds, plan.mb, first.seconds, again.seconds)


def _measured(command: list[str]) -> _Run:
    """Run a command, and ask what it took. Linux only: elsewhere the peak has another unit."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        assert process.returncode == 0, command
        return _Run(seconds, usage.ru_maxrss * 1024 / 1e6, printed.read())


def make_list(raw: Path, rows: int) -> None:
    """A CSV of so many rows, and a stub for each."""
    draw = random.Random(0)
    (raw / "train").mkdir(parents=True)
    with (raw / "train.csv").open("w", encoding="utf-8") as table:
        table.write("label,youtube_id,time_start,time_end,split\n")
        for number in range(rows):
            name, start_s = f"{draw.getrandbits(42):010x}{number % 10}", draw.randrange(300)
            table.write(f"class {number % _CLASSES},{name},{start_s},{start_s + 10},train\n")
            file = os.open(raw / "train" / f"{name}_{start_s:06d}_{start_s + 10:06d}.mp4", os.O_CREAT | os.O_WRONLY)
            os.truncate(file, _FILE_BYTES + draw.randrange(500_000))
            os.close(file)


def stand_in(task: Any, crew: Any, count: Any, job: Any) -> dict[str, Any]:
    """In place of `make_shard`: a clip a source, in a file of a few bytes."""
    from avprep.manifest import clip_row

    url, content = job.shard(task.number), b"stub"
    (job.folder / url).write_bytes(content)
    places = {"mp4": (512, 400_000), "logmel.npy": (401_000, 100_000), "json": (502_000, 900)}
    infos = [{"key": f"{source.key}-0000", "source": source.name, "labels": list(source.labels), "start_s": 0.0,
              "end_s": 10.0, "frames": 160, "width": 212, "height": 160, "sound_s": 10.0, "mel_frames": 640,
              "missing": [], "marks": []} for source in task.sources]
    count.add(len(infos))
    return {"fingerprint": task.fingerprint,
            "shard": {"url": url, "nsamples": len(infos), "filesize": len(content), "sha256": "0" * 64},
            "clips": [clip_row(info, url, places) for info in infos],
            "sources": [{"key": source.key, "taken": 0, "names": [source.name], "files": [None], "failure": None,
                         "clips_written": 1, "clips_failed": 0} for source in task.sources]}

