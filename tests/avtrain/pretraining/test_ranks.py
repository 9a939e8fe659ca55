"""One run in one process, and the same run in several, as torchrun starts them: the same losses, clip for clip."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

RANKED = Path(__file__).with_name("ranked.py")
# Narrow, and with all that differs between processes: clips of 1 to 15 segments, without sound, without picture.
NARROW = ["training.batch_size=8", "training.steps=8", "training.save_every=4", "training.evaluate_every=8",
          "training.learning_rate=1e-3", "data.segment_frames=4", "data.crop=16", "data.scale=[16, 20]",
          "model.visual_width=8", "model.visual_blocks=[1, 1]", "model.audio_width=8", "model.audio_blocks=[1]",
          "model.dimension=16", "model.heads=2", "model.feedforward=32", "model.layers=1", "model.rank=4",
          "objectives.negatives=8", "objectives.draws=2", "data.workers=1", "data.shards_at_once=2"]


@pytest.fixture(scope="module")
def shards(videos, ffmpeg, avprep, tmp_path_factory):
    """20 sources in several shards: 4 s, 34 s, 1 s, silent, sound alone."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "raw").mkdir()
    for copy, name in enumerate(["normal0", "normal1", "normal2", "silent0", "silent1", "short0"] * 3):
        shutil.copy(videos / f"{name}.mp4", root / "raw" / f"{name}-{copy}.mp4")
    shutil.copy(videos / "long0.mp4", root / "raw")
    ffmpeg("-f", "lavfi", "-i", "sine=300:r=44100", "-t", 6, root / "raw" / "heard.wav")
    done = avprep("build", "--dataset", "folder", "--raw", root / "raw", "--out", root, "--shard-mb", 0.1, "--fps", 8,
                  "--workers", 1)
    assert done.returncode == 0, done.stderr
    return root / "folder" / "train"


@pytest.fixture(scope="module")
def damaged(shards, tmp_path_factory):
    """The same, with pictures of three clips that can't be decoded."""
    folder = shutil.copytree(shards, tmp_path_factory.mktemp("damaged") / "train")
    left = 3
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            members = [member for member in archive if member.name.endswith(".mp4")][:1]
        for member in members[:left]:
            left -= 1
            with shard.open("r+b") as file:
                file.seek(member.offset_data)
                file.write(bytes(member.size))
    assert left == 0
    return folder


def run(shards, out, ranks, *more, precision="float64"):
    """`avtrain pretrain` in so many processes; (exit code, what it printed)."""
    settings = [part for setting in NARROW for part in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(RANKED),
         "pretrain", "--preset", "tiny", "--shards", str(shards), "--out", str(out), "--device", "cpu", "--precision",
         precision, *settings, *map(str, more)], capture_output=True, text=True, check=False, timeout=600)
    return done.returncode, done.stdout + done.stderr


def losses(out):
    """Figures of every step, but for times and memory."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items()
             if not name.startswith(("clips_per_s", "waiting_share", "memory_mib"))} for line in lines]


def agree(one, other, within):
    assert len(one) == len(other) > 0
    for ours, theirs in zip(one, other, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, rel=within, abs=within), (ours["step"], name)


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    """The undisturbed run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    code, printed = run(shards, out, 1)
    assert code == 0, printed
    return out


def test_two_processes_are_one_run(shards, alone, tmp_path):
    code, printed = run(shards, tmp_path / "two", 2)
    assert code == 0, printed
    agree(losses(alone), losses(tmp_path / "two"), 1e-8)
    assert printed.count("step 8 of 8") == 1  # one of them speaks


STEPS = ["--set", "training.steps=50", "--set", "training.save_every=50", "--set", "training.evaluate_every=50"]
MODES = {"plain": [], "parts": ["training.micro_batch=MICRO"], "stages run again": ["model.stages_recomputed=1"],
         "early fusion, similar negatives": ["model.fusion=early", "objectives.negatives=64"],
         "late fusion, random negatives": ["model.fusion=late", "objectives.sampling=random"]}


def _settings(settings, micro_batch):
    """As options; MICRO is that."""
    return [part for setting in settings for part in ("--set", setting.replace("MICRO", str(micro_batch)))]


@pytest.fixture(scope="module")
def alone_in(shards, damaged, tmp_path_factory):
    """mode -> the run of one process in it, 50 steps; made once."""
    made = {}

    def of(mode, precision="float64"):
        if (mode, precision) not in made:
            out = tmp_path_factory.mktemp("mode") / "run"
            code, printed = run(damaged if mode == "unreadable" else shards, out, 1, *STEPS,
                                *_settings(MODES.get(mode, []), 4), precision=precision)
            assert code == 0, printed
            made[mode, precision] = losses(out)
        return made[mode, precision]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "ranks"), [
    ("plain", 2), ("plain", 4), ("parts", 2), ("parts", 4), ("unreadable", 2), ("unreadable", 4),
    ("stages run again", 2), ("early fusion, similar negatives", 2), ("late fusion, random negatives", 2)])
def test_any_number_of_processes_is_one_run(shards, damaged, alone_in, tmp_path, mode, ranks):
    """Part j of the one process is the union of the processes' parts j."""
    code, printed = run(damaged if mode == "unreadable" else shards, tmp_path / "run", ranks, *STEPS,
                        *_settings(MODES.get(mode, []), 4 // ranks))
    assert code == 0, printed
    agree(alone_in(mode), losses(tmp_path / "run"), 1e-8)


@pytest.mark.slow
def test_in_float32_they_stay_close(shards, alone_in, tmp_path):
    code, printed = run(shards, tmp_path / "run", 2, *STEPS, precision="float32")
    assert code == 0, printed
    both = [[line["loss"] for line in found] for found in (alone_in("plain", "float32"), losses(tmp_path / "run"))]
    assert both[1][:10] == pytest.approx(both[0][:10], rel=1e-4)
    assert both[1][:40] == pytest.approx(both[0][:40], rel=1e-2)


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes_and_workers(shards, alone_in, tmp_path):
    """In the middle of an epoch: the same batches from there, none twice, none missed."""
    for ranks, workers, until in ((1, 0, 13), (2, 8, 22), (4, 1, 37), (1, 1, 50)):
        code, printed = run(shards, tmp_path / "run", ranks, *STEPS, "--set", f"data.workers={workers}", "--max-steps",
                            until)
        assert code == 0, printed
    mine = [{name: value for name, value in line.items() if not name.startswith("test_")}
            for line in losses(tmp_path / "run")]
    whole = [{name: value for name, value in line.items() if not name.startswith("test_")}
             for line in alone_in("plain")]
    agree(whole, mine, 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["objectives.negatives_from=local"], ["training.sync_batchnorm=false"],
                                      ["objectives.negatives_from=local", "training.sync_batchnorm=false"]])
def test_each_for_itself_is_another_run_that_trains_too(shards, alone_in, tmp_path, settings):
    code, printed = run(shards, tmp_path / "run", 2, *STEPS, *_settings(settings, 0))
    assert code == 0, printed
    one, other = alone_in("plain"), losses(tmp_path / "run")
    assert other[0]["loss"] != pytest.approx(one[0]["loss"], rel=1e-6)
    assert other[-1]["skipped_steps"] == 0
    of_chance = [line["loss"] / line["chance_loss"] for line in other]  # batches differ in what can be predicted
    assert sum(of_chance[-10:]) < 0.97 * sum(of_chance[:10])
