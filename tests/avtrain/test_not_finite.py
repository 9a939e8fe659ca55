"""NaN and infinity: in stored sound, in losses, in features. None of them passes for a result."""

import io
import shutil
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_eval import NETWORK, QUICK, invoke, run_eval, settings

from avtrain.checkpoints.ours import load_checkpoint, save_model
from avtrain.config import read_config
from avtrain.data.clips import ClipDataset
from avtrain.data.decode import ClipUnreadable, decode_log_mel
from avtrain.data.loader import batches
from avtrain.data.order import at_epoch, fixed_order
from avtrain.data.shards import open_folders
from avtrain.data.views import Views
from avtrain.pretraining.objectives import ObjectiveResult, Objectives

SOUND = [*NETWORK, "data.modality=audio"]


def _rewritten(path, value):
    """Put the value into the first log-mel of a shard."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    done = False
    with tarfile.open(path, "w") as tar:
        for member, content in members:
            if member.name.endswith(".logmel.npy") and not done:
                array, done, file = np.load(io.BytesIO(content)), True, io.BytesIO()
                array[3, 5] = value
                np.save(file, array)
                content = file.getvalue()
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def broken(demo_shards, tmp_path_factory):
    """The small demo: NaN in a clip of the training split, infinity in one of the test split."""
    root = tmp_path_factory.mktemp("broken")
    shutil.copytree(demo_shards, root / "demo")
    _rewritten(root / "demo/train/train-000004.tar", np.nan)
    _rewritten(root / "demo/test/test-000000.tar", -np.inf)
    return root / "demo"


@pytest.fixture
def half_broken(broken, demo_shards, tmp_path):
    """The broken split, the other one good."""
    def make(split):
        for name in ("train", "test"):
            shutil.copytree((broken if name == split else demo_shards) / name, tmp_path / "demo" / name)
        return tmp_path / "demo"

    return make


def _pretrain(shards, out, *more):
    return invoke("pretrain", "--shards", shards, "--preset", "sound", "--out", out, "--device", "cpu",
                  *settings([*SOUND, "training.batch_size=8", "objectives.negatives=16", *more]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_log_mel_that_is_not_finite_is_unreadable(value):
    array, file = np.zeros((80, 128), np.float16), io.BytesIO()
    array[79, 127] = value
    np.save(file, array)
    with pytest.raises(ClipUnreadable, match="holds values that are not finite"):
        decode_log_mel(file.getvalue())


def test_such_a_clip_is_left_out_and_named(broken):
    folder = open_folders([str(broken / "train")])
    places = fixed_order([1] * 10)
    data = read_config("sound", SOUND).data
    for dataset in (ClipDataset(folder, data, 0), ClipDataset(folder, data, None, Views("audio", 2))):
        [batch] = batches(dataset, at_epoch([places], 0), 0)
        [one] = batch.unreadable
        assert len(set(batch.keys)) == 9 and torch.isfinite(batch.audio).all()
        assert one.shard.endswith("train-000004.tar") and one.reason == "its log-mel holds values that are not finite"


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_command_names_it(half_broken, checkpoint, tmp_path, split):
    shards = half_broken(split)
    name, tail = f"{split}-00000{4 if split == 'train' else 0}.tar", ["--cache", tmp_path / "cache", "--device", "cpu"]
    commands = [lambda: _pretrain(shards, tmp_path / "run", "training.steps=1"),
                lambda: invoke("embed", "--checkpoint", checkpoint, "--shards", shards / split, "-o",
                               tmp_path / "rows.parquet", *tail),
                lambda: invoke("retrieve", "--checkpoint", checkpoint, "--shards", shards, "-o",
                               tmp_path / "found.png", *tail)]
    commands += [lambda protocol=protocol: run_eval(
        shards.parent, tmp_path / protocol, "demo", "--protocol", protocol, "--modality", "audio",
        *(settings(QUICK) if protocol != "knn" else settings(QUICK[:2]))) for protocol in ("finetune", "linear", "knn")]
    for command in commands:
        done = command()
        assert done.exit_code == 1 and name in done.output, (done.output, done.exception)
        assert "not finite" in done.output and "more than 1 %" in done.output


def test_a_run_whose_losses_never_were_finite_fails(demo_shards, tmp_path, monkeypatch):
    forward = Objectives.forward
    monkeypatch.setattr(Objectives, "forward", lambda *arguments: ObjectiveResult(
        (found := forward(*arguments)).loss * float("nan"), found.parts, found.chances))
    done = _pretrain(demo_shards, tmp_path / "run", "training.steps=3")
    assert done.exit_code == 1 and "not finite 3 times in a row" in done.output, done.output
    assert "the last good checkpoint is none yet" in done.output and "None/" not in done.output


def test_a_run_that_diverges_says_so(demo_shards, tmp_path):
    diverging = ("training.steps=4", "training.learning_rate=1e30", "training.warmup=0")
    done = _pretrain(demo_shards, tmp_path / "one", *diverging, "training.save_every=1", "training.evaluate_every=9")
    assert done.exit_code == 0, done.output
    assert "step 4 of 4" in done.output and "step-000004/model.safetensors" in done.output
    assert "the last 3 steps were not finite; the checkpoint has the weights from before them" in done.output
    one, four = (load_file(tmp_path / f"one/checkpoints/step-00000{step}/model.safetensors") for step in (1, 4))
    assert all(torch.equal(one[name], four[name]) for name in one)


def test_a_transfer_that_diverges_says_so(demo_shards, tmp_path, monkeypatch):
    monkeypatch.setattr("avtrain.transfer.finetune.task_loss", lambda logits, *_: logits.sum() * float("nan"))
    monkeypatch.setattr("avtrain.transfer.probes.task_loss", lambda logits, *_: logits.sum() * float("nan"))
    for protocol in ("finetune", "linear"):
        done = run_eval(demo_shards.parent, tmp_path / protocol, "demo", "--protocol", protocol, "--modality", "audio",
                        *settings(QUICK))
        assert done.exit_code == 1 and "not finite" in done.output, done.output
        assert not (tmp_path / protocol / "results.json").exists()


def test_features_that_are_not_finite_are_no_result(demo_shards, checkpoint, tmp_path):
    model, config, parts = load_checkpoint(checkpoint)
    with torch.no_grad():
        model.audio_norm.weight.fill_(3e38)  # finite itself
        model.audio_norm.bias.fill_(3e38)
    save_model(tmp_path / "huge.safetensors", model, config, parts)
    tail = ["--cache", tmp_path / "cache", "--device", "cpu", "--precision", "float32"]
    for command in (["embed", "--shards", demo_shards / "test", "-o", tmp_path / "rows.parquet"],
                    ["retrieve", "--shards", demo_shards, "-o", tmp_path / "found.png"]):
        done = invoke(command[0], "--checkpoint", tmp_path / "huge.safetensors", *command[1:], *tail)
        assert done.exit_code == 1 and "of it is not finite: use another checkpoint" in done.output, done.output
    assert not list(tmp_path.glob("rows*")) and not list((tmp_path / "cache").glob("*"))
