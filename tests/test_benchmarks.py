"""`make demo-report` and `make ablations`, with few steps: they run, and report what the runs say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _run(module, *arguments):
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_demo_report(demo_shards, tmp_path):
    printed = _run("demo_report", "--shards", demo_shards, "--out", tmp_path, "--seeds", 0, 1, "--steps", 2)
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")]
    assert rows[0][1].strip() == "seed 0" and len(rows) == 1 + 5 + 4 + 2
    last = json.loads((tmp_path / "seed-1/metrics.jsonl").read_text().splitlines()[-1])
    pair = next(row for row in rows if row[0].strip() == "pair accuracy")
    assert float(pair[2]) == pytest.approx(100 * last["test_pair_accuracy"], abs=0.06)


@pytest.mark.slow
def test_a_report_goes_on_refuses_other_settings_and_begins_anew_when_forced(demo_shards, tmp_path):
    options = ("demo_report", "--shards", demo_shards, "--out", tmp_path, "--seeds", 0)
    first = _run(*options, "--steps", 2)
    again = _run(*options, "--steps", 2)
    assert "seed-0: trained, 2 steps" in first and "seed-0: trained already" in again
    assert [line for line in again.splitlines() if line.startswith("|")] == [
        line for line in first.splitlines() if line.startswith("|")]
    refused = subprocess.run([sys.executable, "-m", f"benchmarks.{options[0]}", *map(str, options[1:]), "--steps", "3"],
                             cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and refused.stderr.startswith("Error: ") and "Traceback" not in refused.stderr
    assert "training.steps was 2 and is 3" in refused.stderr
    assert "seed-0: trained, 3 steps" in _run(*options, "--steps", 3, "--force")


@pytest.mark.slow
def test_transfer_report(demo_shards, tmp_path):
    printed = _run("transfer_report", "--shards", demo_shards, "--out", tmp_path, "--steps", 2, "--protocols", "linear",
                   "knn")
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows[1:]] == [
        f"{protocol}, {modality}" for protocol in ("linear", "knn") for modality in ("visual", "audio", "both")]
    start = json.loads((tmp_path / "start/knn-audio/results.json").read_text())["mean"]["top1"]
    after = json.loads((tmp_path / "knn-audio/results.json").read_text())["mean"]["top1"]
    shown = [cell.strip() for cell in rows[5][1:]]
    assert shown[0].startswith(f"{start['percent']:.1f} (") and shown[1].startswith(f"{after['percent']:.1f} (")
    assert float(shown[2]) == pytest.approx(after["percent"] - start["percent"], abs=0.06)


@pytest.mark.slow
def test_esc_report(demo_shards, esc10, avprep, tmp_path):
    out = tmp_path / "shards"
    out.mkdir()
    (out / "demo").symlink_to(demo_shards)
    done = avprep("build", "--dataset", "esc10", "--raw", esc10, "--split", "all", "--out", out)
    assert done.returncode == 0, done.stderr
    printed = _run("esc_report", "--shards", out, "--out", tmp_path, "--folds", 2, "--set", "training.steps=2", "--set",
                   "transfer.epochs=1")
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows[1:]] == [
        f"{start}, {way}" for way in ("linear (published)", "linear (small)", "finetune (small)")
        for start in ("random", "pretrained")]
    for row, folder in ((rows[2], "linear-published"), (rows[6], "finetune-small")):
        results = json.loads((tmp_path / f"pretrained/{folder}-fold2/results.json").read_text())
        assert float(row[1]) == pytest.approx(results["mean"]["top1"]["percent"], abs=0.06)
    learned_on = json.loads((tmp_path / "pretrained-without-fold2/config.json").read_text())
    assert learned_on["data"]["modality"] == "audio"
    assert (tmp_path / "pretrained-without-fold2").is_dir() and not (tmp_path / "pretrained-without-fold1").exists()


@pytest.mark.slow
def test_ablations(demo_shards, tmp_path):
    printed = _run("ablations", "--shards", demo_shards, "--out", tmp_path, "--steps", 2)
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows[1:]] == ["fusion"] * 3 + ["negatives"] * 3 + ["sharing"] * 4
    # The Transformers of the preset (sharing, low rank) are the smallest.
    parameters = [float(row[2].replace(",", "")) for row in rows[-4:]]
    assert parameters == sorted(parameters, reverse=True)
    assert (tmp_path / "ablations.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_scale(tmp_path):
    printed = _run("scale", "--quick", "--out", tmp_path / "scale.png")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    plans, builds = rows[:3], rows[3:]
    assert [row[0] for row in plans] == ["rows", "100", "1,000"] and 0 < float(plans[-1][2]) < 400
    assert [row[:3] for row in builds[1:]] == [[executor, workers, where] for workers in "12" for where in
                                               ("folder", "store") for executor in ("local", "ray")]
    assert all(float(row[3]) > 0 for row in builds[1:]) and "2 workers, 1 clips between folders" in printed
    assert (tmp_path / "scale.png").stat().st_size > 10_000


@pytest.mark.slow
def test_gpu_runs_whole_on_a_cpu(shared_or_none, tmp_path):
    out = tmp_path / "gpu.json"
    reference = ["--reference", shared_or_none / "reference"] if shared_or_none else []
    printed = _run("gpu", "--device", "cpu", "--preset", "tiny", "--set", "model.visual_width=8", "--set",
                   "model.audio_width=8", "--set", "data.segments=3", "--set", "data.segment_frames=4", "--minutes", 10,
                   "--clips", 2, 3, "--shard-clips", 6, "--measures", "all, 3 clips", "run again", "--out", out,
                   *reference)
    rows = json.loads(out.read_text())["rows"]
    assert {row["part"] for row in rows} == {1, 2, 3, 4, 5, 6}
    assert not [row for row in rows if "error" in row or "passed_over" in row or not row.get("ok", True)]
    assert all(row["name"] in printed for row in rows)
    steps = {row["name"]: row for row in rows if row["part"] == 3}
    assert steps["all, 3 clips"]["clips_per_s"] > 0 and "all, first stage run again; with kernels" in steps


@pytest.fixture
def shared_or_none():
    folder = Path(os.environ.get("AV_SHARED", ROOT.parent / "shared"))
    return folder if (folder / "reference").is_dir() else None
