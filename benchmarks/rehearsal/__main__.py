"""`python -m benchmarks.rehearsal`: the paper preset's own settings (batch 256, 15 segments, 6 layers, all objectives)
over 410,000 listed clips, with networks and pixels small enough for two cores: ten steps, a checkpoint, an evaluation,
SIGTERM, going on, embeddings of 10,000 clips. Exit code 1 if a bound is missed."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from avtrain.config import read_config
from benchmarks.rehearsal.shards import CLIPS_A_SHARD, make_folders

# All that is not here is the paper preset's.
SMALL = ["model.visual_width=8", "model.visual_blocks=[1]", "model.audio_width=8", "model.audio_blocks=[1]",
         "model.audio_stem_stride=4", "model.dimension=48", "model.heads=4", "model.feedforward=96", "model.rank=8",
         "data.segment_frames=4", "data.crop=16", "data.scale=[16, 20]"]
TRAIN_FOLDERS, TEST_FOLDERS, SHARDS = 100, 8, 25  # 410,000 and 33,000 clips, in 2,500 and 200 shards
STEPS = 10
GB = 1e9


class Seen(NamedTuple):
    """Most memory at a moment, in bytes: of the largest process, of all of them, and of /dev/shm by them."""

    largest: int
    together: int
    shared: int


def main() -> int:
    """Run it all in a scratch folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, help="Folder for 3 GB of made-up shards.  [default: a temporary one]")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--embedded", type=int, default=3, help="folders of 4,100 clips that are embedded")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=options.scratch))
    try:
        return rehearse(scratch, options.workers, options.embedded)
    finally:
        shutil.rmtree(scratch)


def rehearse(scratch: Path, workers: int, embedded: int) -> int:
    """Prints what came out against the bounds; 1 if one is missed."""
    train, test = (make_folders(scratch, split, folders, SHARDS)
                   for split, folders in (("train", TRAIN_FOLDERS), ("test", TEST_FOLDERS)))
    listed = CLIPS_A_SHARD * SHARDS * TRAIN_FOLDERS
    out, times, config = scratch / "run", scratch / "times.jsonl", read_config("paper", SMALL)
    print(f"{listed:,} clips in {TRAIN_FOLDERS * SHARDS:,} shards, {CLIPS_A_SHARD * SHARDS * TEST_FOLDERS:,} held out; "
          f"batch {config.training.batch_size} in parts of {config.training.micro_batch}, {config.data.segments} "
          f"segments, {config.model.layers} layers, {workers} workers", flush=True)
    command = [sys.executable, "-m", "benchmarks.rehearsal.timed", str(times), "pretrain", "--preset", "paper",
               *(part for folder in train for part in ("--shards", str(folder))),
               *(part for folder in test for part in ("--test-shards", str(folder))),
               *(part for setting in [*SMALL, f"data.workers={workers}", "training.log_every=1"]
                 for part in ("--set", setting)), "--out", str(out), "--device", "cpu", "--precision", "float32"]
    whole, seen = watched([*command, "--max-steps", str(STEPS)], scratch)
    check(whole == 0, f"{STEPS} steps, a checkpoint and an evaluation ended with exit code {whole}", scratch)
    steps = [json.loads(line) for line in times.read_text(encoding="utf-8").splitlines()]
    times.unlink()
    code, stopped = watched(command, scratch, lambda: signal.SIGTERM if lines(out) >= STEPS + 2 else None)
    check(code == 143, f"SIGTERM ended the run with exit code {code}", scratch)
    resumed = [json.loads(line) for line in times.read_text(encoding="utf-8").splitlines()]
    at = lines(out)
    code, _ = watched([*command, "--max-steps", str(at + 1)], scratch)
    check(code == 0 and lines(out) == at + 1, f"going on after SIGTERM ended with exit code {code}", scratch)
    checkpoint = sorted((out / "checkpoints").iterdir())[-1] / "model.safetensors"
    began = time.monotonic()
    code, embedding = watched([
        sys.executable, "-m", "avtrain", "embed", "--checkpoint", str(checkpoint), "-o", str(scratch / "found.parquet"),
        *(part for folder in train[:embedded] for part in ("--shards", str(folder))), "--device", "cpu", "--set",
        f"data.workers={min(2, workers)}"], scratch)
    embed_s = time.monotonic() - began
    check(code == 0, f"embed ended with exit code {code}", scratch)
    # The first step's time is that of the start; the last one's evaluation and checkpoint come after it.
    later = steps[1:] + resumed[1:]
    own = sorted(step["seconds"] - sum(step.get(name, 0.0) for name in ("networks", "optimiser", "waiting", "save",
                                                                          "evaluation")) for step in later)
    evaluations = figures_of(out)
    rows = [("start, until the first step is done", steps[0]["at"] - steps[0]["networks"] - steps[0]["optimiser"],
             20.0, "s"),
            ("going on, likewise", resumed[0]["at"] - resumed[0]["networks"] - resumed[0]["optimiser"], 20.0, "s"),
            ("a step outside networks, optimiser and waiting: median", own[len(own) // 2], 0.1, "s"),
            ("the same: worst", own[-1], 1.0, "s"),
            ("/dev/shm", seen.shared / GB, 1.0, "GB"),
            ("largest process of training", seen.largest / GB, 2.0, "GB"),
            ("all processes of training", seen.together / GB, 8.0, "GB"),
            (f"largest process of embedding {CLIPS_A_SHARD * SHARDS * embedded:,} clips", embedding.largest / GB, 2.0,
             "GB")]
    for name in ("networks", "optimiser", "waiting"):
        median = sorted(step.get(name, 0.0) for step in later)[len(later) // 2]
        print(f"  {name + ', a step: median':<64} {median:8.3f} s")
    print(f"  {'embedding':<64} {embed_s:8.1f} s")
    print(f"  {'held-out figures of the last evaluation':<64} {evaluations:8}")
    print(f"  {'peak of the run that SIGTERM ended':<64} {stopped.together / GB:8.2f} GB")
    missed = 0
    for name, value, bound, unit in rows:
        missed += value > bound
        print(f"  {name:<64} {value:8.3f} {unit:<2} at most {bound:g} {unit}{'' if value <= bound else ': MISSED'}")
    return int(missed > 0)


def lines(out: Path) -> int:
    """The last step that the run has logged."""
    path = out / "metrics.jsonl"
    text = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return int(json.loads(text[-1])["step"]) if text else 0


def figures_of(out: Path) -> int:
    """How many figures the last evaluation has."""
    text = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max(sum(name.startswith("test_") for name in json.loads(line)) for line in text)


def check(right: bool, message: str, scratch: Path) -> None:
    """End with what the command printed, where it is not right."""
    if not right:
        sys.exit(f"{message}:\n{(scratch / 'log').read_text(encoding='utf-8')[-2000:]}")


def watched(command: list[str], scratch: Path, signal_now: object = None) -> tuple[int, Seen]:
    """Run a command; (exit code, most memory). `signal_now` is asked for a signal to send, until it gives one."""
    most = Seen(0, 0, 0)
    before = _shared_bytes()
    with (scratch / "log").open("w", encoding="utf-8") as log, subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT) as process:
        while process.poll() is None:
            sizes = [_private_bytes(pid) for pid in _family(process.pid)]
            most = Seen(max(most.largest, *sizes), max(most.together, sum(sizes)),
                        max(most.shared, _shared_bytes() - before))
            if callable(signal_now) and (number := signal_now()) is not None:
                process.send_signal(number)
                signal_now = None
            time.sleep(0.2)
    return process.returncode, most


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text(encoding="utf-8").rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue  # it has ended
        children.setdefault(parent, []).append(int(path.parent.name))
    family = [pid]
    for one in family:
        family += children.get(one, [])
    return family


def _private_bytes(pid: int) -> int:
    """Memory of its own: what forked processes share is the parent's, and /dev/shm is counted apart."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text(
            encoding="utf-8").splitlines()[1:])
        return 1024 * sum(int(fields[name].split()[0]) for name in ("Private_Clean", "Private_Dirty"))
    except (OSError, KeyError, ValueError):
        return 0


def _shared_bytes() -> int:
    found = os.statvfs("/dev/shm")
    return (found.f_blocks - found.f_bfree) * found.f_frsize


if __name__ == "__main__":
    sys.exit(main())
