"""`avtrain pretrain` as a user runs it: on shards that avprep made, run again, and given wrong things."""

import json
import shutil

import pytest
from small_eval import times_of
from small_pretrain import losses_of, pretrained

from avtrain.checkpoints.ours import load_checkpoint


def test_a_run_leaves_what_is_promised(whole):
    out, printed = whole
    losses = losses_of(out)
    assert [line["step"] for line in losses] == list(range(1, 10)) and losses[-1]["epoch"] == 3
    assert {"mep_visual", "mep_audio", "mep_multimodal", "pair", "pair_accuracy", "top1_visual", "test_loss",
            "test_masked_top1_visual", "test_masked_top1_multimodal_audio"} <= set().union(*losses)
    # Two held-out clips of 15 segments: thirty candidates, not the hundred that there might be.
    assert "masked top-1 of 30 candidates, audio" in printed and printed.count("(chance 3.33 %)") == 4
    assert losses[-1]["test_chance_masked_top1_audio"] == pytest.approx(1 / 30, abs=1e-6)
    assert "held-out pair accuracy" in printed and str(out) in printed
    assert json.loads((out / "config.json").read_text())["model"]["rank"] == 8
    model = load_checkpoint(out / "checkpoints" / "step-000009" / "model.safetensors").model
    assert model.config.dimension == 32
    assert len(list((out / "checkpoints").iterdir())) == 3
    page = (out / "report.html").read_text()
    assert str(out / "report.html") in printed and (out / "report.png").stat().st_size > 10_000
    assert f"<td class=number>{losses[-1]['test_mep_audio']:.4f}</td>" in page
    assert f"<td class=number>{losses[-1]['loss']:.4f}</td>" in page


def test_stopped_during_its_first_checkpoint_a_run_begins_again_by_itself(demo_shards, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        def killed(*arguments):
            raise KeyboardInterrupt

        patch.setattr("avtrain.saved_state.torch.save", killed)
        assert pretrained(demo_shards, out).exit_code == 130
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002.part"]
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    # Nothing that was saved would be lost: the settings may be others too.
    assert pretrained(demo_shards, out, "--set", "training.learning_rate=1e-2", "--max-steps", 1).exit_code == 0
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000001"]
    assert pretrained(demo_shards, out, "--force").exit_code == 0
    assert losses_of(out) == losses_of(whole[0])


def test_run_again_it_says_that_it_is_finished_and_does_nothing(demo_shards, whole):
    before = times_of(whole[0])
    for more in ((), ("--resume",), ("--max-steps", 3), ("--set", "data.workers=0"), ("--set", "training.keep=9"),
                 ("--set", "training.save_minutes=1"), ("--set", "data.timeout_s=5"), ("--new-data",)):
        done = pretrained(demo_shards, whole[0], *more)
        assert done.exit_code == 0, done.output
        assert f"{whole[0]} is at step 9 already: nothing is left to do" in done.output
        assert "held-out pair accuracy" in done.output and "resume" not in done.output
    assert times_of(whole[0]) == before


def test_other_settings_data_or_precision_are_refused_until_forced(demo_shards, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    (out / "notes.txt").touch()
    before = times_of(out)
    precision = json.loads((out / "inputs.json").read_text())["precision"].removeprefix("torch.")
    other = "bfloat16" if precision == "float32" else "float32"
    for more, expected in (
            (("--set", "model.rank=4"), "model.rank was 8 and is 4;"),
            (("--set", "training.steps=12", "--resume"), "training.steps was 9 and is 12;"),
            (("--precision", other), f'precision was "torch.{precision}" and is "torch.{other}";'),
            (("--test-shards", demo_shards / "train"), "test_shards was "),
            (("--shards", demo_shards / "test"), "train_shards was ")):
        done = pretrained(demo_shards, out, *more)
        assert done.exit_code == 1 and expected in done.output, (more, done.output, done.exception)
        assert f"{out} was begun with other settings: " in done.output and "--force to begin anew" in done.output
        assert ("--new-data to go on with these shards" in done.output) == ("shards" in expected)
        assert len(done.output.splitlines()) == 1
    assert times_of(out) == before
    done = pretrained(demo_shards, out, "--set", "training.steps=2", "--force")
    assert done.exit_code == 0, done.output
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"] and len(losses_of(out)) == 2
    assert (out / "notes.txt").exists() and len(list((out / "tensorboard").iterdir())) == 1
    assert json.loads((out / "config.json").read_text())["training"]["steps"] == 2


def test_a_run_of_before_its_inputs_were_written_down_goes_on(demo_shards, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    (tmp_path / "run" / "inputs.json").unlink()
    assert "at step 9 already" in pretrained(demo_shards, tmp_path / "run").output


def test_a_folder_of_something_else_is_left_alone(demo_shards, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    before = times_of(tmp_path)
    for more in ((), ("--force",)):
        done = pretrained(demo_shards, tmp_path / "run", *more)
        assert done.exit_code == 1 and "is of no run of `avtrain pretrain`" in done.output, done.output
    assert times_of(tmp_path) == before


def test_sound_alone_of_two_datasets(demo_shards, avprep, ffmpeg, tmp_path):
    for number in range(3):
        (tmp_path / "raw" / "hum").mkdir(parents=True, exist_ok=True)
        ffmpeg("-f", "lavfi", "-i", f"sine={300 + 200 * number}:d=5", tmp_path / "raw" / "hum" / f"{number}.wav")
    done = avprep("build", "--dataset", "folder", "--raw", tmp_path / "raw", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "run"
    done = pretrained(demo_shards, out, "--shards", tmp_path / "folder" / "train", "--set", "data.modality=audio",
                   "--set", "training.steps=4")
    assert done.exit_code == 0, (done.output, done.exception)
    losses = losses_of(out)
    assert losses[-1]["epoch"] == 1  # 10 + 3 clips in batches of 4
    seen = set().union(*losses)
    assert {"mep_audio", "mep_multimodal", "top1_audio", "test_masked_top1_audio"} <= seen
    assert not {"mep_visual", "pair", "top1_visual", "test_masked_top1_visual"} & seen
    assert "pair accuracy" not in done.stdout and (out / "report.html").is_file()


def test_mistakes_are_answered_in_a_line(demo_shards, tmp_path):
    for arguments, expected in (
            ((tmp_path / "nowhere", tmp_path / "run"), "nowhere/index.json"),
            ((demo_shards, tmp_path / "run", "--set", "model.rnk=4"), "did you mean model.rank"),
            ((demo_shards, tmp_path / "run", "--set", "data.segment_frames=5"), "must divide"),
            ((demo_shards, tmp_path / "run", "--preset", "huge"), "known are"),
            ((demo_shards, tmp_path / "run", "--device", "cuda:7"), "--device cuda:7")):
        done = pretrained(*arguments)
        assert done.exit_code == 1 and expected in done.output, (arguments, done.output, done.exception)


def test_how_a_batch_is_divided_may_change_and_that_is_said(demo_shards, tmp_path):
    out = tmp_path / "run"
    assert pretrained(demo_shards, out, "--max-steps", 2).exit_code == 0
    done = pretrained(demo_shards, out, "--max-steps", 3, "--set", "training.micro_batch=2")
    assert done.exit_code == 0, done.output
    assert "from step 2 on with 2 clips at once instead of 4" in done.output
