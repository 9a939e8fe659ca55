"""Settings under the names of earlier versions. `earlier.safetensors` was written by one (commit 6303c41)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_eval import QUICK, invoke, results_of, run_eval, settings

from avtrain.checkpoints.ours import load_checkpoint
from avtrain.config import Config, ModelConfig, config_from, config_to, read_config
from avtrain.errors import AvtrainError
from avtrain.retired import RETIRED, Retired

EARLIER = Path(__file__).parent / "earlier.safetensors"
# Today's names of what it was written with.
SETTINGS = ["model.visual_width=4", "model.visual_blocks=[1]", "model.audio_width=2", "model.audio_blocks=[1]",
            "model.dimension=8", "model.heads=2", "model.feedforward=8", "model.layers=1", "model.rank=2",
            "model.max_segments=3", "model.log_mel_mean=-3", "model.log_mel_std=4", "data.segments=3",
            "data.segment_frames=4", "data.crop=24", "data.scale=[24, 32]", "data.workers=0", "training.batch_size=4",
            "training.steps=4", "training.save_every=2", "training.evaluate_every=4", "objectives.negatives=4"]
# Fields that every protocol had, and their defaults.
OF_ALL_PROTOCOLS = {"backbone_rate": 0.0, "warmup": 0.0, "sequence": False, "random_start": False,
                    "frequency_mask": 0.05, "time_mask": 0.05, "equalizer": 0.0, "frequency_shift": 0, "accumulate": 1,
                    "neighbours": 20}


def written_by_the_earlier_version() -> dict[str, str]:
    with safe_open(EARLIER, framework="pt") as file:
        return dict(file.metadata())


@pytest.fixture
def gone(monkeypatch):
    monkeypatch.setitem(RETIRED, "model.gone", Retired(instead="model.rank does that"))


def test_an_earlier_checkpoint_is_read():
    assert "log_mel_deviation" in written_by_the_earlier_version()["config"]
    model, config, _ = load_checkpoint(EARLIER)
    today = read_config("tiny", SETTINGS)
    assert (config.model, config.data) == (today.model, today.data) and config.model.log_mel_std == 4
    sound = torch.randn(2, 3, 1, 80, 128)
    unscaled = load_checkpoint(EARLIER).model
    unscaled.audio_cnn.mean, unscaled.audio_cnn.std = 0.0, 1.0
    with torch.no_grad():
        torch.testing.assert_close(model.embed(None, sound)[0].audio_pooled,
                                   unscaled.embed(None, (sound + 3) / 4)[0].audio_pooled)


def test_an_earlier_run_is_gone_on_with(demo_shards, tmp_path):
    run = tmp_path / "run"
    command = ["pretrain", "--shards", demo_shards, "--out", run, "--device", "cpu", *settings(SETTINGS)]
    done = invoke(*command, "--max-steps", 2)
    assert done.exit_code == 0, done.output
    metadata, weights = written_by_the_earlier_version(), run / "checkpoints/step-000002/model.safetensors"
    save_file(load_file(weights), weights, metadata)
    weights.with_name("checkpoint.json").unlink()  # earlier versions had none
    (run / "config.json").write_text(metadata["config"])
    other = invoke(*command, "--set", "model.log_mel_std=3")
    assert other.exit_code == 1 and "model.log_mel_std was 4.0 and is 3.0;" in other.output
    done = invoke(*command)
    assert done.exit_code == 0 and "step 4 of 4" in done.output, done.output
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_an_earlier_evaluation_is_gone_on_with(tree, tmp_path):
    def run(*more):
        return run_eval(tree, tmp_path, "ucf101", "--protocol", "linear", "--split", "2", *settings(QUICK), *more)

    assert run().exit_code == 0
    path, results = tmp_path / "settings.json", results_of(tmp_path)
    before = json.loads(path.read_text())
    before["model"]["log_mel_deviation"] = before["model"].pop("log_mel_std")
    before["protocol"] |= OF_ALL_PROTOCOLS
    path.write_text(json.dumps(before))
    done = run()
    assert done.exit_code == 0 and "finished already" in done.output and results_of(tmp_path) == results, done.output
    other = run("--set", "transfer.epochs=2", "--set", "data.crop=20")
    assert other.exit_code == 1 and "settings: protocol.epochs was 1 and is 2, data.crop was 24 and is 20;" in (
        other.output)


def test_people_may_use_a_name_that_was_changed(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text("[model]\nlog_mel_deviation = 3\n")
    assert read_config(str(mine)) == Config(replace(ModelConfig(), log_mel_std=3.0))
    assert read_config("sound", ["model.log_mel_deviation=3"]).model.log_mel_std == 3
    mine.write_text("[model]\nlog_mel_deviation = 3\nlog_mel_std = 4\n")
    with pytest.raises(AvtrainError, match=r"mine\.toml: model\.log_mel_deviation: is called model\.log_mel_std now"):
        read_config(str(mine))


@pytest.mark.usefixtures("gone")
def test_what_is_gone_is_passed_over_where_it_was_written_down():
    written = config_to(read_config("tiny"))
    written["model"]["gone"] = 2
    assert config_from(written, "a run") == read_config("tiny")


@pytest.mark.usefixtures("gone")
def test_what_is_gone_can_not_be_asked_for(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text("[model]\ngone = 3\n")
    for preset, overrides, where in ((str(mine), [], mine), ("tiny", ["model.gone=3"], "--set model.gone=3")):
        with pytest.raises(AvtrainError) as error:
            read_config(preset, overrides)
        assert str(error.value) == f"{where}: model.gone: there is no such setting any more; model.rank does that"
