"""`avtrain eval` by every protocol, on small trees laid out like the published datasets."""

import json
import re
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score
from small_eval import NETWORK, QUICK, VIEWS, invoke, predictions_of, results_of, run_eval, settings

from avtrain.checkpoints.ours import save_model
from avtrain.config import read_config
from avtrain.models.avbert import AVBert
from avtrain.transfer.tasks import TASKS


def test_ucf101_finetuned_as_published_in_small(tree, tmp_path):
    done = run_eval(tree, tmp_path / "run", "ucf101", *settings(QUICK), "--split", "2", "--validation", "0.3")
    assert done.exit_code == 0, done.output
    results, lines = results_of(tmp_path / "run"), predictions_of(tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run/split-2/metrics.jsonl").read_text().splitlines()]
    assert {line["video"]: line["labels"] for line in lines} == {"v_Archery_g03_c01": [0], "v_Bowling_g03_c01": [1]}
    right = accuracy_score([line["labels"][0] for line in lines], [np.argmax(line["scores"]) for line in lines])
    assert results["splits"]["2"]["top1"]["percent"] == 100 * right == results["mean"]["top1"]["percent"]
    np.testing.assert_allclose([sum(line["scores"]) for line in lines], 1, atol=1e-5)
    assert results["differs_from_published"] == [
        "3 of 101 classes", "other epochs, batch_size, train_views, test_views, data.segment_frames, data.crop, "
        "data.scale", "1 of 3 splits", "2 of 3734 test videos", "a part of training held out"]
    assert "published: top-1 87.5 %" in done.output and "validation of split 2: top-1" in done.output
    assert results["validation"]["2"]["top1"]["percent"] == round(metrics[-1]["validation_top1"], 2)
    assert results["settings"]["views"] == {"clips": 3, "crops": 3, "sequence": False}
    assert results["shards"]["2"]["fps"] == 15 and re.fullmatch("[0-9a-f]{16}", results["shards"]["2"]["test"])
    assert results["settings"]["protocol"]["head_rate"] == 0.03 and results["settings"]["seed"] == 0
    assert results["version"] and results["settings"]["protocol_name"] == "finetune"
    videos = results["shards"]["2"]["videos"]
    assert videos["train"] + videos["validation"] == 7 and videos["validation"] == 3
    assert (tmp_path / "run/confusion.png").stat().st_size > 5000


def test_kinetics_sounds_with_a_silent_video_and_one_of_two_clips(tree, tmp_path):
    done = run_eval(tree, tmp_path / "run", "kinetics-sounds", *settings(QUICK), "--set", "transfer.micro_batch=2")
    assert done.exit_code == 0, done.output
    lines = predictions_of(tmp_path / "run")
    assert len(lines) == 7 and sum("long" in line["video"] for line in lines) == 1
    assert results_of(tmp_path / "run")["settings"]["views"] == {"clips": 3, "crops": 3, "sequence": True}


def test_charades_by_mean_average_precision(tree, tmp_path):
    done = run_eval(tree, tmp_path / "run", "charades", *settings(QUICK))
    assert done.exit_code == 0, done.output
    lines = predictions_of(tmp_path / "run")
    targets = np.asarray([[label in line["labels"] for label in range(4)] for line in lines])
    assert targets.sum(0).tolist() == [2, 2, 0, 0]
    scores = np.asarray([line["scores"] for line in lines])
    expected = average_precision_score(targets[:, :2], scores[:, :2], average="macro")
    assert results_of(tmp_path / "run")["mean"]["map"]["percent"] == pytest.approx(100 * expected, abs=0.01)
    assert not (tmp_path / "run/confusion.png").exists()


def _finetuned(tree, out, checkpoint, *more):
    """The scores of Kinetics-Sounds' test videos."""
    done = invoke("eval", "--task", "kinetics-sounds", "--checkpoint", checkpoint, "--shards", tree, "--out", out,
                  "--device", "cpu", "--precision", "float32", *settings(QUICK), *more)
    assert done.exit_code == 0, done.output
    return [line["scores"] for line in predictions_of(out)]


@pytest.mark.parametrize("modality", ["visual", "audio"])
def test_a_modality_left_out_changes_nothing_if_it_changes(tree, tmp_path, modality):
    """Predictions from one modality are the same whatever the network of the other one holds."""
    found = []
    config = read_config("tiny", NETWORK)
    for factor in (1.0, -3.0):
        torch.manual_seed(0)
        model = AVBert(config.model)
        with torch.no_grad():
            for parameter in getattr(model, "visual_cnn" if modality == "audio" else "audio_cnn").parameters():
                parameter.mul_(factor)
        path = tmp_path / f"{factor}.safetensors"
        save_model(path, model, config)
        found.append(_finetuned(tree, tmp_path / f"run{factor}", path, "--modality", modality))
    assert found[0] == found[1]


def test_stages_that_run_again_change_no_transfer(tree, tmp_path):
    """A checkpoint that was pretrained to save memory is finetuned as one that was not."""
    found = []
    for stages in (0, 1):
        config = read_config("tiny", [*NETWORK, f"model.stages_recomputed={stages}", "model.dropout=0"])
        torch.manual_seed(0)
        path = tmp_path / f"{stages}.safetensors"
        save_model(path, AVBert(config.model), config)
        found.append(_finetuned(tree, tmp_path / f"run{stages}", path))
    assert found[0] == found[1]


def test_what_differs_from_the_published_setting_is_said(tree_with_esc10, checkpoint, tmp_path, monkeypatch):
    splits = {fold: TASKS["esc10"].splits[fold] for fold in "12"}
    monkeypatch.setitem(TASKS, "esc10", replace(TASKS["esc10"], splits=splits, classes=2, published={"top1": 12.3},
                                                source="a paper"))
    for number, (options, expected) in enumerate((
            ((), "published: top-1 12.3 %; a paper"),
            (("--set", "transfer.dropout=0.2"), "not the published setting: other dropout"),
            (("--protocol", "knn"), "knn instead of linear"),
            (("--recipe", "small"), "other epochs, loss, standardize"),
            (("--split", "1"), "1 of 2 splits"))):
        done = invoke("eval", "--task", "esc10", "--checkpoint", checkpoint, "--shards", tree_with_esc10, "--out",
                      tmp_path / str(number), "--cache", tmp_path / "cache", "--device", "cpu", *options)
        assert done.exit_code == 0 and expected in done.output, done.output
        assert "published: top-1 12.3 %; a paper" in done.output
        assert ("not the published setting" in done.output) == (number > 0)


def test_a_test_video_that_cannot_be_decoded_is_left_out_and_said(tree, checkpoint, tmp_path, monkeypatch):
    for module in ("data.loader", "transfer.evaluate"):
        monkeypatch.setattr(f"avtrain.{module}.MOST_UNREADABLE", 0.2)  # one of seven, not of a hundred
    shutil.copytree(tree / "kinetics-sounds", tmp_path / "kinetics-sounds")
    _damage_a_silent_video(tmp_path / "kinetics-sounds" / "test")
    for protocol, more in (("finetune", QUICK), ("linear", QUICK), ("knn", VIEWS)):
        done = invoke("eval", "--task", "kinetics-sounds", "--checkpoint", checkpoint, "--shards", tmp_path, "--out",
                      tmp_path / protocol, "--cache", tmp_path / "cache", "--device", "cpu", "--protocol", protocol,
                      *settings(more))
        assert done.exit_code == 0, done.output
        assert "6 videos (1 more can't be decoded and are left out)" in done.output
        assert len(predictions_of(tmp_path / protocol)) == 6
        assert results_of(tmp_path / protocol)["shards"]["1"]["videos"]["unreadable"] == 1


def _damage_a_silent_video(folder):
    [shard] = folder.glob("*.tar")
    with tarfile.open(shard) as archive:
        member = next(member for member in archive if member.name.endswith(".mp4") and "silent" in member.name)
    with shard.open("r+b") as file:
        file.seek(member.offset_data)
        file.write(bytes(member.size))


def test_a_training_video_that_cannot_be_decoded_is_passed_over_even_alone_in_its_part(tree, checkpoint, tmp_path,
                                                                                       monkeypatch):
    monkeypatch.setattr("avtrain.data.loader.MOST_UNREADABLE", 0.2)  # one of nine
    shutil.copytree(tree / "kinetics-sounds", tmp_path / "kinetics-sounds")
    _damage_a_silent_video(tmp_path / "kinetics-sounds" / "train")
    _finetuned(tmp_path, tmp_path / "run", checkpoint, "--set", "transfer.micro_batch=1")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/split-1/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)


@pytest.mark.parametrize(("protocol", "fields"), [
    ("linear", [*QUICK, "transfer.epochs=20"]), ("knn", [*VIEWS, "transfer.neighbours=3"])])
def test_frozen_features_over_five_folds_and_from_the_cache(tree_with_esc10, checkpoint, tmp_path, protocol, fields,
                                                            monkeypatch):
    def run(out):
        done = invoke("eval", "--task", "esc10", "--checkpoint", checkpoint, "--protocol", protocol, "--recipe",
                      "small", "--shards", tree_with_esc10, "--out", out, "--cache", tmp_path / "cache", "--device",
                      "cpu", *settings(fields))
        assert done.exit_code == 0, done.output
        return done.stdout

    printed = run(tmp_path / "one")
    assert all(f"split {fold}: top-1" in printed for fold in range(1, 6)) and "mean: top-1" in printed
    lines = predictions_of(tmp_path / "one")
    assert len({line["video"] for line in lines}) == len(lines) == 10
    assert all(line["video"][0] == line["split"] for line in lines)
    with monkeypatch.context() as patch:
        patch.setattr(AVBert, "embed", None)  # nothing is computed again
        assert run(tmp_path / "two").splitlines()[:-1] == printed.splitlines()[:-1]
    assert predictions_of(tmp_path / "two") == lines
    assert results_of(tmp_path / "one")["mean"]["top1"]["percent"] >= 70  # chance 50: two very different sounds


def test_small_recipe_learns_colours(tree, tmp_path):
    done = run_eval(tree, tmp_path / "run", "kinetics-sounds", "--recipe", "small", "--modality", "visual",
                    *settings(["transfer.epochs=12", "transfer.train_views=2", "transfer.test_views=2",
                              "transfer.batch_size=3", "transfer.dropout=0"]))
    assert done.exit_code == 0, done.output
    assert results_of(tmp_path / "run")["mean"]["top1"]["percent"] == 100


@pytest.mark.slow
def test_released_checkpoint_goes_through_its_three_tasks(tree_with_esc10, released_state, tmp_path):
    """The authors' names and sizes: the whole network for Kinetics-Sounds, one CNN and a head for the others."""
    tree = tree_with_esc10
    whole = tmp_path / "kinetics-sounds.pyth"
    torch.save({"epoch": 20, "state_dict": released_state}, whole)
    for task, cnn, outputs in (("ucf101", "visual_conv", 2048), ("esc10", "audio_conv", 1024)):
        state = {name.removeprefix("avbert."): tensor for name, tensor in released_state.items()
                 if name.startswith(f"avbert.{cnn}.")}
        state |= {"head.projection.weight": torch.zeros(50, outputs), "head.projection.bias": torch.zeros(50)}
        torch.save({"state_dict": state}, tmp_path / f"{task}.pyth")
    ours = tmp_path / "ours.safetensors"
    assert invoke("import-released", tmp_path / "ucf101.pyth", "-o", ours).exit_code == 0
    quick = ["transfer.epochs=1", "transfer.train_views=1", "transfer.test_views=1", "transfer.test_crops=1",
             "data.workers=0", "data.crop=32", "data.scale=[32, 32]"]
    for one_cnn in (tmp_path / "ucf101.pyth", ours):
        done = invoke("eval", "--task", "esc10", "--checkpoint", one_cnn, "--shards", tree, "--device", "cpu")
        assert done.exit_code == 1 and "an audio CNN would be needed, and it has learned only a vis" in done.output
    done = invoke("embed", "--checkpoint", tmp_path / "ucf101.pyth", "--shards", tree / "ucf101" / "test2", "-o",
                  tmp_path / "f.parquet", "--device", "cpu")
    assert done.exit_code == 1 and "Transformers would be needed" in done.output
    for task, batch in (("ucf101", 5), ("esc10", 8), ("kinetics-sounds", 3)):
        split = "2" if task == "ucf101" else "1"
        done = invoke("eval", "--task", task, "--checkpoint", tmp_path / f"{task}.pyth", "--shards", tree, "--split",
                      split, "--out", tmp_path / task, "--cache", tmp_path, "--device", "cpu",
                      *settings([*quick, f"transfer.batch_size={batch}"]))
        assert done.exit_code == 0, done.output
        results = results_of(tmp_path / task)
        assert len(results["settings"]["checkpoint_sha256"]) == 64
        assert np.isfinite([line["scores"] for line in predictions_of(tmp_path / task)]).all()
