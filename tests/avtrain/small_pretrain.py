"""`avtrain pretrain` as a user runs it, on a network smaller than the tiny preset's: seconds, not minutes."""

import json
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from unittest import mock

from small_eval import invoke

SMALL = ["training.batch_size=4", "training.steps=9", "training.save_every=2", "training.evaluate_every=9",
         "training.learning_rate=1e-3", "data.segment_frames=4", "data.crop=24", "data.scale=[24, 32]",
         "model.visual_width=8", "model.audio_width=8", "model.dimension=32", "model.feedforward=64", "model.layers=1",
         "model.rank=8", "objectives.negatives=16", "data.workers=1"]


def command(shards, out, *more):
    settings = [part for setting in SMALL for part in ("--set", setting)]
    return [sys.executable, "-m", "avtrain.cli", "pretrain", "--shards", str(shards), "--out", str(out), "--device",
            "cpu", *settings, *map(str, more)]


def pretrained(*arguments, drawn=False):
    """In this process, where everything is loaded already. Curves, which take as long as some steps, only if `drawn`.
    """
    undrawn = mock.patch("avtrain.pretraining.report.picture_of", lambda lines: b"")
    with nullcontext() if drawn else undrawn:
        return invoke(*command(*arguments)[3:])  # what comes after "python -m avtrain.cli"


def started(*arguments):
    """In a process of its own, in a group of its own, as a shell starts one: signals are not ignored."""
    return subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def losses_of(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items()
             if name not in ("clips_per_s", "waiting_share", "memory_gib", "evaluation_s")} for line in lines]


def wait_for_lines(out, count, process):
    """Until the run has logged so many steps."""
    path, until = out / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.005)
