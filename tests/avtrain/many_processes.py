"""`avtrain pretrain` in several processes, for tests: narrow, and with clips of all kinds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RANKED = Path(__file__).with_name("pretraining") / "ranked.py"
# Narrow, and with all that differs between processes: clips of 1 to 15 segments, without sound, without picture.
NARROW = ["training.batch_size=8", "training.steps=8", "training.save_every=4", "training.evaluate_every=8",
          "training.learning_rate=1e-3", "data.segment_frames=4", "data.crop=16", "data.scale=[16, 20]",
          "model.visual_width=8", "model.visual_blocks=[1, 1]", "model.audio_width=8", "model.audio_blocks=[1]",
          "model.dimension=16", "model.heads=2", "model.feedforward=32", "model.layers=1", "model.rank=4",
          "objectives.negatives=8", "objectives.draws=2", "data.workers=1", "data.shards_at_once=2"]


def torchrun(ranks, *options):
    """The beginning of a command: so many processes, which torchrun starts."""
    how = options or ["--standalone"]
    return [sys.executable, "-m", "torch.distributed.run", *how, "--nproc-per-node", str(ranks)]


def arguments(shards, out, *more, precision="float64"):
    """The script and what follows."""
    settings = [part for setting in NARROW for part in ("--set", setting)]
    return [str(RANKED), "pretrain", "--preset", "tiny", "--shards", str(shards), "--out", str(out), "--device", "cpu",
            "--precision", precision, *settings, *map(str, more)]


def run(shards, out, ranks, *more, precision="float64"):
    """`avtrain pretrain` in so many processes; (exit code, what it printed)."""
    done = subprocess.run([*torchrun(ranks), *arguments(shards, out, *more, precision=precision)], capture_output=True,
                          text=True, check=False, timeout=600)
    return done.returncode, done.stdout + done.stderr


def losses(out):
    """Figures of every step, but for times and memory."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items()
             if not name.startswith(("clips_per_s", "waiting_share", "memory_gib"))} for line in lines]


def agree(one, other, within):
    assert len(one) == len(other) > 0
    for ours, theirs in zip(one, other, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, rel=within, abs=within), (ours["step"], name)
