"""`avtrain eval`, `embed` and `retrieve` as a user runs them, on small trees laid out like the published datasets."""

import json
import re
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from sklearn.metrics import accuracy_score, average_precision_score

from avtrain.checkpoint import save_model
from avtrain.cli import main
from avtrain.config import read_config
from avtrain.data.order import ClipPlace
from avtrain.data.views import ListedClip, collate_rows
from avtrain.engine import Run
from avtrain.models.avbert import AVBert
from avtrain.tasks import TASKS, protocol_for
from avtrain.transfer import Trial, held_out

NETWORK = ["data.segment_frames=4", "data.crop=24", "data.scale=[24, 32]", "data.workers=0", "model.visual_width=8",
           "model.visual_blocks=[1, 1]", "model.audio_width=8", "model.audio_blocks=[1, 1]", "model.dimension=32",
           "model.feedforward=64", "model.layers=1", "model.rank=8"]
QUICK = ["transfer.epochs=1", "transfer.train_views=2", "transfer.test_views=3", "transfer.batch_size=4"]
CLASSES = ["Archery", "Bowling", "Cricket"]


def _settings(values):
    return [part for value in values for part in ("--set", value)]


def _avtrain(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def _eval(tree, out, task, *more, network=NETWORK):
    return _avtrain("eval", "--task", task, "--init", "random", "--preset", "tiny", "--shards", tree, "--out", out,
                    "--cache", tree / "features", "--device", "cpu", *_settings(network), *more)


def _results(out):
    return json.loads((out / "results.json").read_text())


def _predictions(out):
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def videos(ffmpeg, tmp_path_factory):
    """4 s, 34 s, 1 s, and 4 s without sound; in three colours and pitches."""
    folder = tmp_path_factory.mktemp("videos")
    for index, colour in enumerate(("red", "green", "blue")):
        for name, seconds, heard in (("normal", 4, True), ("long", 34, True), ("short", 1, True),
                                     ("silent", 4, False)):
            if name in ("normal", "silent") or index == 0:
                sound = ("-f", "lavfi", "-i", f"sine={200 * 3**index}:r=44100") if heard else ()
                ffmpeg("-f", "lavfi", "-i", f"color={colour}:s=48x36:r=8", *sound, "-t", seconds, "-c:v", "libx264",
                       "-preset", "ultrafast", folder / f"{name}{index}.mp4")
    return folder


def _put(video, *places):
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, place)


def _build(avprep, dataset, raw, tree, split="all", *more):
    done = avprep("build", "--dataset", dataset, "--raw", raw, "--out", tree, "--split", split, "--workers", 1,
                  *more)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def tree(videos, media, avprep, tmp_path_factory):
    """Shards like UCF101 (15 fps; Cricket has no test clips, one video is too short for ten clips), Kinetics-Sounds
    (one video a class without sound, one of 34 s), Charades and ESC-10."""
    root = tmp_path_factory.mktemp("transfer")
    ucf = root / "raw" / "ucf"
    lists = ucf / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    (lists / "classInd.txt").write_text("".join(f"{n + 1} {name}\n" for n, name in enumerate(CLASSES)))
    train, test = [], []
    for index, name in enumerate(CLASSES):
        for group in range(1, 4):
            path = f"{name}/v_{name}_g{group:02d}_c01.avi"
            _put(videos / ("short0.mp4" if index == 0 and group in (1, 3) else f"normal{index}.mp4"),
                 ucf / "UCF-101" / path)
            (test if group == 3 and index < 2 else train).append(path)
    (lists / "trainlist02.txt").write_text("".join(f"{path} 1\n" for path in train))
    (lists / "testlist02.txt").write_text("".join(f"{path}\n" for path in test))
    for split in ("train2", "test2"):
        _build(avprep, "ucf101", ucf, root, split, "--fps", 15)

    sounds = root / "raw" / "sounds"
    for index in range(3):
        _put(videos / f"normal{index}.mp4", *(sounds / "train" / f"class{index}" / f"{n}.mp4" for n in range(2)),
             sounds / "test" / f"class{index}" / "t.mp4")
        _put(videos / f"silent{index}.mp4", sounds / "train" / f"class{index}" / "silent.mp4",
             sounds / "test" / f"class{index}" / "silent.mp4")
    _put(videos / "long0.mp4", sounds / "test" / "class0" / "long.mp4")
    _build(avprep, "kinetics-sounds", sounds, root)

    charades = root / "raw" / "charades"
    (charades / "Charades").mkdir(parents=True)
    (charades / "Charades/Charades_v1_classes.txt").write_text("c000 Holding\nc001 Sitting\nc002 Flying\nc003 Eating\n")
    rows = {"train": ["c000 0 6;c001 1 3", "c001 0 5", "c000 0 2;c002 0 4", "", "c002 1 6"],
            "test": ["c000 0 6", "c001 0 6;c000 1 2", "c001 2 4"]}
    for split, actions in rows.items():
        lines = [f"{split}{number},{of_video}\n" for number, of_video in enumerate(actions)]
        (charades / "Charades" / f"Charades_v1_{split}.csv").write_text("id,actions\n" + "".join(lines))
        for number in range(len(actions)):
            _put(videos / f"normal{number % 3}.mp4", charades / "Charades_v1_480" / f"{split}{number}.mp4")
    _build(avprep, "charades", charades, root)

    for name in ("001 - Dog bark", "002 - Rain"):
        for fold in "12345":
            for path in sorted((media / "esc10" / name).glob(f"{fold}-*.ogg"))[:1]:
                _put(path, root / "raw" / "esc10" / name / path.name)
    _build(avprep, "esc10", root / "raw" / "esc10", root)
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network of ours, with its file."""
    config = read_config("tiny", NETWORK)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_model(path, AVBert(config.model), config)
    return path


def test_ucf101_finetuned_as_published_in_small(tree, tmp_path):
    done = _eval(tree, tmp_path / "run", "ucf101", *_settings(QUICK), "--split", "2", "--validation", "0.3")
    assert done.exit_code == 0, done.output
    results, lines = _results(tmp_path / "run"), _predictions(tmp_path / "run")
    assert {line["video"]: line["labels"] for line in lines} == {"v_Archery_g03_c01": [0], "v_Bowling_g03_c01": [1]}
    right = accuracy_score([line["labels"][0] for line in lines], [np.argmax(line["scores"]) for line in lines])
    assert results["splits"]["2"]["top1"]["percent"] == 100 * right == results["mean"]["top1"]["percent"]
    np.testing.assert_allclose([sum(line["scores"]) for line in lines], 1, atol=1e-5)
    assert results["differs_from_published"][0] == "3 of 101 classes" and "87.5" not in done.output
    assert "epochs" in results["differs_from_published"][1]
    assert results["differs_from_published"][2:] == ["1 of 3 splits", "a part of training held out"]
    assert results["settings"]["views"] == {"clips": 3, "crops": 3, "sequence": False}
    assert results["shards"]["2"]["fps"] == 15 and re.fullmatch("[0-9a-f]{16}", results["shards"]["2"]["test"])
    assert results["settings"]["protocol"]["head_rate"] == 0.03 and results["settings"]["seed"] == 0
    assert results["version"] and results["settings"]["protocol_name"] == "finetune"
    videos = results["shards"]["2"]["videos"]
    assert videos["train"] + videos["validation"] == 7 and videos["validation"] == 3
    metrics = [json.loads(line) for line in (tmp_path / "run/split-2/metrics.jsonl").read_text().splitlines()]
    assert "validation_top1" in metrics[-1] and (tmp_path / "run/confusion.png").stat().st_size > 5000
    # The published schedule: a cosine from both rates, 0 at the end, without a warm-up.
    assert metrics[0]["learning_rate"] == 0.03


def test_kinetics_sounds_with_a_silent_video_and_one_of_two_clips(tree, tmp_path):
    done = _eval(tree, tmp_path / "run", "kinetics-sounds", *_settings(QUICK), "--set", "transfer.accumulate=2")
    assert done.exit_code == 0, done.output
    lines = _predictions(tmp_path / "run")
    assert len(lines) == 7 and sum("long" in line["video"] for line in lines) == 1
    assert _results(tmp_path / "run")["settings"]["views"] == {"clips": 3, "crops": 3, "sequence": True}


def test_charades_by_mean_average_precision(tree, tmp_path):
    done = _eval(tree, tmp_path / "run", "charades", *_settings(QUICK))
    assert done.exit_code == 0, done.output
    lines = _predictions(tmp_path / "run")
    targets = np.asarray([[label in line["labels"] for label in range(4)] for line in lines])
    assert targets.sum(0).tolist() == [2, 2, 0, 0]
    scores = np.asarray([line["scores"] for line in lines])
    expected = average_precision_score(targets[:, :2], scores[:, :2], average="macro")
    assert _results(tmp_path / "run")["mean"]["map"]["percent"] == pytest.approx(100 * expected, abs=0.01)
    assert not (tmp_path / "run/confusion.png").exists()


def _finetuned(tree, out, checkpoint, *more):
    """The scores of Kinetics-Sounds' test videos."""
    done = _avtrain("eval", "--task", "kinetics-sounds", "--checkpoint", checkpoint, "--shards", tree, "--out", out,
                    "--device", "cpu", "--precision", "float32", *_settings(QUICK), *more)
    assert done.exit_code == 0, done.output
    return [line["scores"] for line in _predictions(out)]


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


def test_the_batch_of_batch_norm_is_the_protocols_not_pretrainings(tree, tmp_path):
    """A checkpoint that was pretrained a few segments at a time is finetuned as one that was not."""
    found = []
    for segments_at_once in (0, 1):
        config = read_config("tiny", [*NETWORK, f"model.segments_at_once={segments_at_once}", "model.dropout=0"])
        torch.manual_seed(0)
        path = tmp_path / f"{segments_at_once}.safetensors"
        save_model(path, AVBert(config.model), config)
        found.append(_finetuned(tree, tmp_path / f"run{segments_at_once}", path))
    assert found[0] == found[1]


def test_the_published_number_stands_beside_the_same_thing_only(tree, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "esc10", replace(TASKS["esc10"], classes=2, published={"top1": 12.3}, source="a paper"))
    for number, (options, expected) in enumerate((
            ((), "published: top-1 12.3 %; a paper"),
            (("--set", "transfer.dropout=0.2"), "not comparable with published numbers: other dropout"),
            (("--protocol", "knn"), "knn instead of linear"),
            (("--recipe", "small"), "other epochs, loss, standardize"),
            (("--split", "1"), "1 of 5 splits"))):
        done = _avtrain("eval", "--task", "esc10", "--checkpoint", checkpoint, "--shards", tree, "--out",
                        tmp_path / str(number), "--cache", tmp_path / "cache", "--device", "cpu", *options)
        assert done.exit_code == 0 and expected in done.output, done.output
        assert ("12.3" in done.output) == (number == 0)


def test_a_test_video_that_cannot_be_decoded_is_left_out_and_said(tree, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("avtrain.data.loader._MOST_UNREADABLE", 0.2)  # one of seven, not of a hundred
    shutil.copytree(tree / "kinetics-sounds", tmp_path / "kinetics-sounds")
    [shard] = (tmp_path / "kinetics-sounds" / "test").glob("*.tar")
    with tarfile.open(shard) as archive:
        member = next(member for member in archive if member.name.endswith(".mp4") and "silent" in member.name)
    with shard.open("r+b") as file:
        file.seek(member.offset_data)
        file.write(bytes(member.size))
    for protocol in ("finetune", "linear"):
        done = _avtrain("eval", "--task", "kinetics-sounds", "--checkpoint", checkpoint, "--shards", tmp_path, "--out",
                        tmp_path / protocol, "--cache", tmp_path / "cache", "--device", "cpu", "--protocol", protocol,
                        *_settings(QUICK))
        assert done.exit_code == 0, done.output
        assert "6 videos (1 more can't be decoded and are left out)" in done.output
        assert len(_predictions(tmp_path / protocol)) == 6
        assert _results(tmp_path / protocol)["shards"]["1"]["videos"]["unreadable"] == 1


@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_frozen_features_over_five_folds_and_from_the_cache(tree, checkpoint, tmp_path, protocol, monkeypatch):
    def run(out):
        done = _avtrain("eval", "--task", "esc10", "--checkpoint", checkpoint, "--protocol", protocol, "--recipe",
                        "small", "--shards", tree, "--out", out, "--cache", tmp_path / "cache", "--device", "cpu",
                        *_settings([*QUICK, "transfer.epochs=20", "transfer.neighbours=3"]))
        assert done.exit_code == 0, done.output
        return done.stdout

    printed = run(tmp_path / "one")
    assert all(f"split {fold}: top-1" in printed for fold in range(1, 6)) and "mean: top-1" in printed
    lines = _predictions(tmp_path / "one")
    assert len({line["video"] for line in lines}) == len(lines) == 10
    assert all(line["video"][0] == line["split"] for line in lines)
    with monkeypatch.context() as patch:
        patch.setattr(AVBert, "embed", None)  # nothing is computed again
        assert run(tmp_path / "two").splitlines()[:-1] == printed.splitlines()[:-1]
    assert _predictions(tmp_path / "two") == lines
    assert _results(tmp_path / "one")["mean"]["top1"]["percent"] >= 70  # chance 50: two very different sounds


def test_small_recipe_learns_colours(tree, tmp_path):
    done = _eval(tree, tmp_path / "run", "kinetics-sounds", "--recipe", "small", "--modality", "visual",
                 *_settings(["transfer.epochs=12", "transfer.train_views=2", "transfer.test_views=2",
                             "transfer.batch_size=3", "transfer.dropout=0"]))
    assert done.exit_code == 0, done.output
    assert _results(tmp_path / "run")["mean"]["top1"]["percent"] == 100


def test_killed_and_resumed_gives_the_same_predictions(tree, tmp_path, monkeypatch):
    options = [*_settings(QUICK), "--set", "transfer.epochs=3", "--split", "2"]
    assert _eval(tree, tmp_path / "whole", "ucf101", *options).exit_code == 0
    save = Run.save
    with monkeypatch.context() as patch:
        patch.setattr("avtrain.finetune._SAVE_EVERY", 4)

        def save_and_die(run):
            save(run)
            if run.position.step == 8:
                raise KeyboardInterrupt

        patch.setattr(Run, "save", save_and_die)
        assert _eval(tree, tmp_path / "killed", "ucf101", *options).exit_code == 130
    assert not (tmp_path / "killed/results.json").exists()
    again = _eval(tree, tmp_path / "killed", "ucf101", *options)
    assert again.exit_code == 1 and "--resume" in again.output
    other = _eval(tree, tmp_path / "killed", "ucf101", *options, "--resume", "--seed", "1")
    assert other.exit_code == 1 and "seed" in other.output
    done = _eval(tree, tmp_path / "killed", "ucf101", *options, "--resume")
    assert done.exit_code == 0, done.output
    assert _predictions(tmp_path / "killed") == _predictions(tmp_path / "whole")
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed/split-2/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 10))


def test_stopped_before_its_first_checkpoint_it_starts_anew(tree, tmp_path, monkeypatch):
    options = [*_settings(QUICK), "--set", "transfer.epochs=3", "--split", "2"]
    log = Run._log
    with monkeypatch.context() as patch:
        def log_and_die(run, *arguments):
            log(run, *arguments)
            if run.position.step == 3:
                raise KeyboardInterrupt

        patch.setattr(Run, "_log", log_and_die)
        assert _eval(tree, tmp_path, "ucf101", *options).exit_code == 130
    assert _eval(tree, tmp_path, "ucf101", *options, "--resume").exit_code == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "split-2/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 10))


def test_all_tasks_that_are_there_in_one_table(tree, tmp_path):
    done = _eval(tree, tmp_path / "all", "all", "--protocol", "knn", "--recipe", "small", *_settings(QUICK))
    assert done.exit_code == 0, done.output
    rows = [line for line in done.output.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == ["| ucf101", "| esc10", "| kinetics-sounds", "| charades"]
    assert (tmp_path / "all" / "charades" / "results.json").is_file()


def test_all_tasks_go_on_where_they_were_stopped_and_one_that_fails_does_not_stop_the_others(tree, tmp_path):
    options = ("--protocol", "knn", "--recipe", "small", *_settings(QUICK))
    assert _eval(tree, tmp_path, "all", *options, "--split", "2").exit_code == 0
    before = _predictions(tmp_path / "ucf101")
    shutil.rmtree(tmp_path / "esc10")  # as if it had been stopped before
    done = _eval(tree, tmp_path, "all", *options, "--split", "2", "--resume")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "esc10" / "results.json").is_file() and _predictions(tmp_path / "ucf101") == before
    assert not (tmp_path / "charades").exists()  # it has no second split

    done = _eval(tree, tmp_path / "visual", "all", *options, "--modality", "visual")
    assert done.exit_code == 1 and "1 of 4 tasks could not be evaluated" in done.output, done.output
    assert "esc10: not one training clip has picture" in done.output
    rows = [line for line in done.output.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == ["| ucf101", "| kinetics-sounds", "| charades"]


def test_another_protocol_does_not_replace_what_took_long(tree, tmp_path):
    assert _eval(tree, tmp_path, "ucf101", *_settings(QUICK), "--split", "2").exit_code == 0
    before = _results(tmp_path)
    done = _eval(tree, tmp_path, "ucf101", "--protocol", "knn", "--split", "2", *_settings(QUICK))
    assert done.exit_code == 1 and "holds an evaluation already" in done.output
    assert _results(tmp_path) == before


def test_other_shards_or_precision_are_no_resumption(tree, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(tree / "esc10", shards / "esc10")
    options = ("--protocol", "knn", "--recipe", "small", "--split", "1", *_settings(QUICK))
    assert _eval(shards, tmp_path / "run", "esc10", *options, "--precision", "float32").exit_code == 0
    done = _eval(shards, tmp_path / "run", "esc10", *options, "--precision", "bfloat16", "--resume")
    assert done.exit_code == 1 and "precision differ" in done.output
    for part, other in (("fold1", "fold2"), ("fold2", "fold1")):
        shutil.copytree(tree / "esc10" / other, shards / "esc10" / part, dirs_exist_ok=True)
    done = _eval(shards, tmp_path / "run", "esc10", *options, "--precision", "float32", "--resume")
    assert done.exit_code == 1 and "begun on other shards" in done.output


def test_a_batch_of_which_nothing_can_be_decoded_is_empty():
    batch = collate_rows(["a-0000: damaged"])
    assert batch.keys == [] and batch.unreadable == ["a-0000: damaged"]


@pytest.mark.parametrize(("task", "key", "group"), [
    ("ucf101", "v_HandstandPushups_g{}_c{}-0000", r"g(\d+)"), ("esc10", "3-{}-{}-0000", r"3-(\d+)"),
    ("kinetics-sounds", "video_{}-000{}", r"_(\d+)")])
def test_a_validation_part_never_splits_a_group(task, key, group):
    clips = [ListedClip(ClipPlace(0, number), key.format(10 + number // 4, "ABCD"[number % 4] if "esc" in task
                                                         else number % 4), (0,), 32, 128) for number in range(80)]
    trial = Trial(task, "finetune", protocol_for(task, "finetune", "published"), "both", validation=0.1)
    learned, validation = held_out(clips, trial, TASKS[task])
    assert len(learned) == 72 and {clip.key for clip in learned + validation} == {clip.key for clip in clips}
    groups = [{re.search(group, clip.key)[1] for clip in part} for part in (learned, validation)]
    assert not groups[0] & groups[1] and len(groups[1]) == 2
    assert held_out(clips, trial, TASKS[task]) == (learned, validation)


def test_mistakes_are_answered_in_a_line(tree, checkpoint, avprep, tmp_path):
    text = tmp_path / "notes.safetensors"
    text.write_text("no checkpoint")
    pickled = tmp_path / "notes.pyth"
    pickled.write_text("no checkpoint")
    incomplete = tmp_path / "incomplete"
    shutil.copytree(tree / "kinetics-sounds" / "train", incomplete / "kinetics-sounds" / "train")
    mixed = tmp_path / "mixed"
    shutil.copytree(tree / "kinetics-sounds" / "train", mixed / "kinetics-sounds" / "train")
    shutil.copytree(tree / "ucf101" / "test2", mixed / "kinetics-sounds" / "test")
    fewer = tmp_path / "fewer"
    shutil.copytree(tree / "kinetics-sounds", fewer / "kinetics-sounds")
    index = json.loads((fewer / "kinetics-sounds/test/index.json").read_text())
    index["classes"] = index["classes"][:2]
    (fewer / "kinetics-sounds/test/index.json").write_text(json.dumps(index))
    silent = tmp_path / "silent"
    shutil.copytree(tree / "esc10", silent / "esc10")
    unlabelled = tmp_path / "unlabelled"
    shutil.copytree(tree / "charades" / "train", unlabelled / "charades" / "train")
    (tmp_path / "raw" / "Charades").mkdir(parents=True)
    raw = tree / "raw" / "charades"
    shutil.copy(raw / "Charades/Charades_v1_classes.txt", tmp_path / "raw" / "Charades")
    (tmp_path / "raw" / "Charades" / "Charades_v1_test.csv").write_text("id,actions\ntest0,\n")
    _put(raw / "Charades_v1_480" / "test0.mp4", tmp_path / "raw" / "Charades_v1_480" / "test0.mp4")
    _build(avprep, "charades", tmp_path / "raw", unlabelled, "test")
    config = read_config("tiny", [*NETWORK, "data.modality=audio"])
    save_model(tmp_path / "heard.safetensors", AVBert(config.model), config)
    random, ours = ("--init", "random", "--preset", "tiny"), ("--checkpoint", checkpoint)
    heard = ("--checkpoint", tmp_path / "heard.safetensors")
    for arguments, expected in (
            (("ucf102", tree, *random), "--task ucf102: known are ucf101"),
            (("ucf101", tree), "--init random"),
            (("ucf101", tree, *ours, "--init", "random"), "one of the two"),
            (("ucf101", tree, "--checkpoint", tmp_path / "none.safetensors"), "No such file"),
            (("ucf101", tree, "--checkpoint", text), "not a checkpoint of avtrain"),
            (("ucf101", tree, "--checkpoint", pickled), "not a checkpoint that can be read safely"),
            (("ucf101", tree, *ours, "--split", "4"), "--split 4: ucf101 has 1, 2, 3"),
            (("kinetics-sounds", incomplete, *ours), "avprep build --dataset kinetics-sounds --split test"),
            (("esc50", tree, *ours), "avprep build --dataset esc50 --split fold"),
            (("kinetics-sounds", mixed, *ours), "spec differ"),
            (("kinetics-sounds", fewer, *ours), "classes differ"),
            (("esc10", silent, *ours, "--modality", "visual"), "which --modality visual needs"),
            (("charades", tree, *ours, "--set", "transfer.loss=hinge"), "several labels"),
            (("ucf101", tree, *ours), "avprep build --dataset ucf101 --split train1"),
            (("ucf101", tree, *ours, "--set", "transfer.epoch=1"), "did you mean transfer.epochs"),
            (("ucf101", tree, *ours, "--set", "model.rank=4"), "only transfer.* and data.* can be set"),
            (("ucf101", tree, *random, "--set", "training.steps=4"), "only transfer.* and data.* and model.* can be"),
            (("ucf101", tree, *ours, "--set", "data.noise=[-5, -3]"), "data.noise would do nothing here"),
            (("ucf101", tree, *random, "--set", "data.segments=4"), "data.segments would do nothing here"),
            (("kinetics-sounds", tree, *heard), "a visual CNN would be needed, and it has learned only an audio CNN"),
            (("charades", unlabelled, *ours), "not one test clip has a label"),
            (("kinetics-sounds", tree, *ours, "--set", "transfer.test_views=30"), "positions for 21 segments"),
            (("ucf101", tree, *ours, "--split", "2", "--set", "data.mels=40"), "mel_bands 80"),
            (("all", tmp_path, *ours), "no task has all shards")):
        done = _avtrain("eval", "--task", arguments[0], "--shards", arguments[1], "--out", tmp_path / "run", "--device",
                        "cpu", *arguments[2:])
        assert done.exit_code == 1 and expected in done.output, (arguments, done.output, done.exception)
    for command, options, expected in (
            ("embed", ("--shards", tree / "esc10" / "fold1", *ours, "--set", "data.time_mask=0"), "would do nothing"),
            ("embed", ("--shards", tree / "esc10" / "fold1", *ours, "--set", "data.segments=22"), "at most"),
            ("embed", ("--shards", tree / "esc10" / "fold1", *heard, "--set", "data.modality=both"), "a visual CNN"),
            ("retrieve", ("--shards", tree / "kinetics-sounds", *heard), "a visual CNN would be needed")):
        done = _avtrain(command, "-o", tmp_path / "output", "--device", "cpu", *options)
        assert done.exit_code == 1 and expected in done.output, (command, options, done.output, done.exception)


def test_embeddings_in_a_table(tree, checkpoint, tmp_path):
    folder = tree / "kinetics-sounds" / "test"
    done = _avtrain("embed", "--checkpoint", checkpoint, "--shards", folder, "-o", tmp_path / "f.parquet", "--cache",
                    tmp_path, "--device", "cpu")
    assert done.exit_code == 0, done.output
    rows = pq.read_table(tmp_path / "f.parquet").to_pylist()
    assert f"{len(rows)} rows" in done.output
    long = sorted((row for row in rows if "long" in row["key"]), key=lambda row: row["time_s"])
    assert [row["time_s"] for row in long] == [2.0 * number for number in range(17)]
    assert all(row["labels"] == [0] and len(row["visual"]) == len(row["multimodal"]) == 32 for row in long)
    silent = [row for row in rows if "silent" in row["key"]]
    assert len(silent) == 6 and all(row["audio"] is None and row["visual"] is not None for row in silent)


def test_retrieval_finds_the_pitch_that_goes_with_a_colour(tree, checkpoint, tmp_path):
    done = _avtrain("retrieve", "--checkpoint", checkpoint, "--shards", tree / "kinetics-sounds", "-o",
                    tmp_path / "found.png", "--cache", tmp_path, "--device", "cpu")
    assert done.exit_code == 0, (done.output, done.exception)
    [sound, picture] = re.findall(r"recall@1 ([\d.]+) %", done.output)
    # Red has four clips with sound in the test, all alike: two of six are found by their colour, of the others some.
    assert float(sound) >= 30 and float(picture) >= 30
    assert (tmp_path / "found.png").stat().st_size > 10_000


@pytest.mark.slow
def test_released_checkpoint_goes_through_its_three_tasks(tree, released_state, tmp_path):
    """The authors' names and sizes: the whole network for Kinetics-Sounds, one CNN and a head for the others."""
    whole = tmp_path / "kinetics-sounds.pyth"
    torch.save({"epoch": 20, "state_dict": released_state}, whole)
    for task, cnn, outputs in (("ucf101", "visual_conv", 2048), ("esc10", "audio_conv", 1024)):
        state = {name.removeprefix("avbert."): tensor for name, tensor in released_state.items()
                 if name.startswith(f"avbert.{cnn}.")}
        state |= {"head.projection.weight": torch.zeros(50, outputs), "head.projection.bias": torch.zeros(50)}
        torch.save({"state_dict": state}, tmp_path / f"{task}.pyth")
    quick = ["transfer.epochs=1", "transfer.train_views=1", "transfer.test_views=1", "transfer.test_crops=1",
             "data.workers=0", "data.crop=32", "data.scale=[32, 32]"]
    done = _avtrain("eval", "--task", "esc10", "--checkpoint", tmp_path / "ucf101.pyth", "--shards", tree, "--device",
                    "cpu")
    assert done.exit_code == 1 and "an audio CNN would be needed, and it has learned only a visual CNN" in done.output
    done = _avtrain("embed", "--checkpoint", tmp_path / "ucf101.pyth", "--shards", tree / "ucf101" / "test2", "-o",
                    tmp_path / "f.parquet", "--device", "cpu")
    assert done.exit_code == 1 and "Transformers would be needed" in done.output
    for task, batch in (("ucf101", 5), ("esc10", 8), ("kinetics-sounds", 3)):
        split = "2" if task == "ucf101" else "1"
        done = _avtrain("eval", "--task", task, "--checkpoint", tmp_path / f"{task}.pyth", "--shards", tree, "--split",
                        split, "--out", tmp_path / task, "--cache", tmp_path, "--device", "cpu",
                        *_settings([*quick, f"transfer.batch_size={batch}"]))
        assert done.exit_code == 0, done.output
        results = _results(tmp_path / task)
        assert len(results["settings"]["checkpoint_sha256"]) == 64
        assert np.isfinite([line["scores"] for line in _predictions(tmp_path / task)]).all()
