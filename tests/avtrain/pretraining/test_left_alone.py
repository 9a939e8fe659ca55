"""`avtrain pretrain` left alone: stopped, killed, with workers that end, full disks, damaged files. Gone on with, it
comes to the losses of a run that nothing disturbed, bit for bit."""

import json
import os
import random
import shutil
import signal
import time
from types import SimpleNamespace

import psutil
import pytest
from small_pretrain import losses_of, pretrained, started, wait_for_lines

from avtrain.data.clips import ClipDataset
from avtrain.data.order import ClipPlace
from avtrain.data.shards import open_folders
from avtrain.pretraining.held_out import HeldOut

LONG = ["--set", "training.steps=12", "--set", "training.save_every=1000", "--set", "training.evaluate_every=6"]


@pytest.fixture(scope="module")
def long(demo_shards, tmp_path_factory):
    """Twelve steps, long enough to send signals to, with checkpoints only where it is evaluated."""
    out = tmp_path_factory.mktemp("runs") / "long"
    assert pretrained(demo_shards, out, *LONG).exit_code == 0
    return out


@pytest.mark.seconds
@pytest.mark.parametrize(("number", "to_group", "code"), [
    (signal.SIGTERM, True, 143), pytest.param(signal.SIGUSR1, False, 0, marks=pytest.mark.slow),
    pytest.param(signal.SIGINT, True, 130, marks=pytest.mark.slow)])
def test_a_signal_stops_with_a_checkpoint_and_the_same_command_goes_on(demo_shards, long, tmp_path, number, to_group,
                                                                       code):
    out = tmp_path / "run"
    with started(demo_shards, out, *LONG) as process:
        wait_for_lines(out, 3, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        (os.killpg if to_group else os.kill)(process.pid, number)  # as a terminal and schedulers do, or to it alone
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    step = len(losses_of(out))
    checkpoint = out / "checkpoints" / f"step-{step:06d}"
    assert printed == (f"stopped by {number.name} at step {step}: the same command goes on from {checkpoint}\n")
    assert 3 <= step < 12 and (checkpoint / "training.pt").is_file() and "Traceback" not in errors
    assert workers and not psutil.wait_procs(workers, timeout=10)[1] and (out / "report.html").is_file()
    assert pretrained(demo_shards, out, *LONG).exit_code == 0
    assert losses_of(out) == losses_of(long)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_losses(demo_shards, whole, tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    draw, out = random.Random(seed), tmp_path / "run"
    with started(demo_shards, out) as process:  # before its first checkpoint, which is that of step 2
        while not (out / "config.json").exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    for _ in range(2):
        with started(demo_shards, out) as process:
            while not (out / "metrics.jsonl").exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 1.5))
            process.kill()
    done = pretrained(demo_shards, out)
    assert done.exit_code == 0, (seed, done.output, done.exception)
    assert losses_of(out) == losses_of(whole[0]), seed


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 9])
def test_an_evaluation_that_was_cut_off_is_made_up(demo_shards, tmp_path, monkeypatch, step):
    """Step 9 is the last one, where nothing else is left to do."""
    settings = ("--set", "training.evaluate_every=3")
    assert pretrained(demo_shards, tmp_path / "whole", *settings).exit_code == 0
    figures, out = HeldOut.figures, tmp_path / "run"

    def killed(self, network):
        if len(losses_of(out)) == step - 1:
            raise KeyboardInterrupt
        return figures(self, network)

    with monkeypatch.context() as patch:
        patch.setattr(HeldOut, "figures", killed)
        assert pretrained(demo_shards, out, *settings).exit_code == 130
    assert len(losses_of(out)) == step - 1
    assert json.loads((out / f"checkpoints/step-{step:06d}/checkpoint.json").read_text())["due"]["step"] == step
    done = pretrained(demo_shards, out, *settings)
    assert done.exit_code == 0 and "nothing is left" not in done.output, (done.output, done.exception)
    assert losses_of(out) == losses_of(tmp_path / "whole")


@pytest.mark.slow
def test_workers_that_are_killed_are_replaced(demo_shards, long, tmp_path):
    out, killed = tmp_path / "run", set()
    with started(demo_shards, out, *LONG, "--set", "data.workers=2") as process:
        for lines in (2, 8):
            wait_for_lines(out, lines, process)
            child = psutil.Process(process.pid).children()[-1]
            killed.add(child.pid)
            child.kill()
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and len(killed) == 2, errors
    assert errors.count("a worker was killed") == errors.count("workers are started again") == 2
    assert losses_of(out) == losses_of(long)


@pytest.mark.slow
def test_a_clip_that_ends_workers_is_named_and_nothing_is_lost(demo_shards, whole, tmp_path, monkeypatch):
    out, fill = tmp_path / "run", ClipDataset._fill

    def fatal(self, row, wanted, *rest):
        if wanted.epoch == 1 and row.key == key:
            os.kill(os.getpid(), signal.SIGSEGV)
        fill(self, row, wanted, *rest)

    key = open_folders([str(demo_shards / "train")]).rows.at(ClipPlace(1, 0)).key
    with monkeypatch.context() as patch:
        patch.setattr(ClipDataset, "_fill", fatal)
        done = pretrained(demo_shards, out)
    assert done.exit_code == 1 and done.output.count("ended too early (SIGSEGV)") == 2, done.output
    clip = f"{demo_shards}/train/train-000001.tar: {key}\n"
    assert f"workers are started again at {clip}" in done.output
    assert done.output.endswith(f"it was for the second time, while it made {clip}")
    assert len(losses_of(out)) >= 3 and _newest(out) == len(losses_of(out))
    assert pretrained(demo_shards, out).exit_code == 0
    assert losses_of(out) == losses_of(whole[0])


def _newest(out):
    return max(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir())


def test_a_full_disk_costs_a_checkpoint(demo_shards, whole, tmp_path, monkeypatch):
    usage, full = shutil.disk_usage, {2, 4}

    def of_disk(path):
        step = int(path.name[5:11])
        return SimpleNamespace(free=1000) if step in full else usage(path)

    monkeypatch.setattr("shutil.disk_usage", of_disk)
    done = pretrained(demo_shards, tmp_path / "some")
    assert done.exit_code == 0, done.output
    for step in (2, 4):
        assert f"step {step}: no checkpoint can be written to {tmp_path / 'some' / 'checkpoints'}: " in done.output
    assert "it needs " in done.output and " MiB, and 0.0 MiB are free; it is tried again" in done.output
    assert sorted(path.name for path in (tmp_path / "some/checkpoints").iterdir()) == [
        f"step-00000{step}" for step in (6, 8, 9)]
    assert losses_of(tmp_path / "some") == losses_of(whole[0])


@pytest.mark.slow
def test_a_disk_that_stays_full_loses_no_step_and_ends_with_an_error(demo_shards, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    done = pretrained(demo_shards, tmp_path / "all")
    assert done.exit_code == 1 and "Error: no checkpoint can be written" in done.output.splitlines()[-1]
    assert losses_of(tmp_path / "all") == losses_of(whole[0])


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_gone_on_from(demo_shards, whole, tmp_path):
    out = tmp_path / "run"
    assert pretrained(demo_shards, out, "--max-steps", 5).exit_code == 0
    with (out / "checkpoints/step-000005/training.pt").open("rb+") as file:
        file.truncate(1000)
    done = pretrained(demo_shards, out)
    assert done.exit_code == 0, done.output
    assert "step-000005 is damaged (training.pt is not what was written): set aside, the run goes on from step-000004" \
        in done.output
    assert [line["loss"] for line in losses_of(out)] == [line["loss"] for line in losses_of(whole[0])]
    for path in (out / "checkpoints").glob("*/training.pt"):
        path.unlink()
    done = pretrained(demo_shards, out)
    assert done.exit_code == 1 and "no whole checkpoint before it: --force begins anew" in done.output
    assert len(losses_of(out)) == 9  # nothing was begun anew by itself


@pytest.mark.slow
def test_checkpoints_by_the_clock_change_nothing(demo_shards, whole, tmp_path):
    out = tmp_path / "run"
    often = ("--set", "training.save_minutes=1e-6", "--set", "training.save_every=1000", "--set", "training.keep=99")
    assert pretrained(demo_shards, out, *often).exit_code == 0
    assert len(list((out / "checkpoints").iterdir())) == 9 and losses_of(out) == losses_of(whole[0])


@pytest.mark.slow
def test_what_changes_no_result_may_change(demo_shards, whole, tmp_path):
    out = tmp_path / "run"
    assert pretrained(demo_shards, out, "--max-steps", 5).exit_code == 0
    other = [f"--set={setting}" for setting in (
        "training.keep=1", "training.save_every=3", "training.save_minutes=9", "training.log_every=2",
        "training.evaluate_every=7", "data.workers=0", "data.timeout_s=99")]
    done = pretrained(demo_shards, out, *other)
    assert done.exit_code == 0, done.output
    losses = {line["step"]: line["loss"] for line in losses_of(whole[0])}
    assert {line["step"]: line["loss"] for line in losses_of(out)} == {
        step: losses[step] for step in (1, 2, 3, 4, 5, 6, 7, 8, 9)}
    assert _newest(out) == 9 and len(list((out / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_new_data_go_on_from_the_weights_with_an_epoch_of_their_own(demo_shards, tmp_path):
    out = tmp_path / "run"
    assert pretrained(demo_shards, out, "--max-steps", 4).exit_code == 0  # in the middle of epoch 1
    other = ("--shards", demo_shards / "test", "--test-shards", demo_shards / "test", "--max-steps", 6)
    done = pretrained(demo_shards, out, *other)
    assert done.exit_code == 1 and "--new-data to go on with these shards, --force to begin anew" in done.output
    done = pretrained(demo_shards, out, *other, "--new-data", "--set", "model.rank=4")
    assert done.exit_code == 1 and "model.rank was 8" in done.output and "train_shards" not in done.output
    for more in (("--max-steps", 5), ()):  # the same command again begins no epoch anew
        done = pretrained(demo_shards, out, *other, "--new-data", *more)
        assert done.exit_code == 0, done.output
        said = f"{out}: from step 4 on with other shards, and epoch 2 begins on them"
        assert (said in done.output) == bool(more)
    assert [(line["step"], line["epoch"]) for line in losses_of(out)][2:] == [(3, 1), (4, 1), (5, 2), (6, 2)]


@pytest.mark.slow
def test_max_time_counts_from_the_start_of_the_command(demo_shards, tmp_path, monkeypatch):
    monkeypatch.setattr("avtrain.cli.time", SimpleNamespace(monotonic=lambda: time.monotonic() - 60))
    done = pretrained(demo_shards, tmp_path / "run", "--max-time", "1")
    assert done.exit_code == 1 and "--max-time 1.0: there was no time for a step" in done.output
    assert pretrained(demo_shards, tmp_path / "run", "--max-time", "9").exit_code == 0
    assert _newest(tmp_path / "run") == 9
