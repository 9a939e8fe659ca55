"""Runs of `avtrain eval`, `embed` and `retrieve`: stopped and gone on with, over all tasks, with mistakes."""

import json
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_eval import (
    QUICK,
    VIEWS,
    invoke,
    predictions_of,
    results_of,
    run_eval,
    settings,
    times_of,
)

from avtrain.data.manifest import rows_of, schema
from avtrain.engine import Run
from avtrain.models.avbert import AVBert
from avtrain.run_folder import RunFolder, write_settings
from avtrain.transfer.splits import held_out
from avtrain.transfer.tasks import TASKS


def test_killed_and_resumed_gives_the_same_predictions(tree, tmp_path, monkeypatch):
    options = [*settings(QUICK), "--set", "transfer.epochs=2", "--split", "2"]
    assert run_eval(tree, tmp_path / "whole", "ucf101", *options).exit_code == 0
    save = Run.save
    with monkeypatch.context() as patch:
        patch.setattr("avtrain.transfer.finetune._SAVE_EVERY", 2)

        def save_and_die(run, *rest):
            save(run, *rest)
            if run.position.step == 4:
                raise KeyboardInterrupt

        patch.setattr(Run, "save", save_and_die)
        assert run_eval(tree, tmp_path / "killed", "ucf101", *options).exit_code == 130
    assert not (tmp_path / "killed/results.json").exists()
    other = run_eval(tree, tmp_path / "killed", "ucf101", *options, "--seed", "1")
    assert other.exit_code == 1 and "seed was 0 and is 1" in other.output
    done = run_eval(tree, tmp_path / "killed", "ucf101", *options)
    assert done.exit_code == 0, done.output
    assert predictions_of(tmp_path / "killed") == predictions_of(tmp_path / "whole")
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed/split-2/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 7))


def test_stopped_during_its_first_checkpoint_it_begins_again_by_itself(tree, tmp_path, monkeypatch):
    options = [*settings(QUICK), "--set", "transfer.epochs=2", "--split", "2"]
    with monkeypatch.context() as patch:
        def killed(*arguments):
            raise KeyboardInterrupt

        patch.setattr("avtrain.transfer.finetune._SAVE_EVERY", 4)
        patch.setattr("avtrain.saved_state.torch.save", killed)
        assert run_eval(tree, tmp_path, "ucf101", *options, "--seed", "1").exit_code == 130
    assert [path.name for path in (tmp_path / "split-2/checkpoints").iterdir()] == ["step-000004.part"]
    with (tmp_path / "split-2/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert run_eval(tree, tmp_path, "ucf101", *options).exit_code == 0  # nothing was saved: the seed may be another
    assert [path.name for path in (tmp_path / "split-2/checkpoints").iterdir()] == ["step-000006"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "split-2/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 7))


def test_all_tasks_that_are_there_in_one_table(tree_with_esc10, tmp_path):
    done = run_eval(tree_with_esc10, tmp_path / "all", "all", "--protocol", "knn", "--recipe", "small",
                    *settings(VIEWS))
    assert done.exit_code == 0, done.output
    rows = [line for line in done.output.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == ["| ucf101", "| esc10", "| kinetics-sounds", "| charades"]
    assert "| top-1 87.5 %, top-5 97.4 % | README of" in rows[0] and "knn instead of finetune" in rows[0]
    assert (tmp_path / "all" / "charades" / "results.json").is_file()


def test_all_tasks_go_on_where_they_were_stopped_and_one_that_fails_does_not_stop_the_others(tree_with_esc10, tmp_path):
    tree, options = tree_with_esc10, ("--protocol", "knn", "--recipe", "small", *settings(VIEWS))
    assert run_eval(tree, tmp_path, "all", *options, "--split", "2").exit_code == 0
    before = predictions_of(tmp_path / "ucf101")
    shutil.rmtree(tmp_path / "esc10")  # as if it had been stopped before
    done = run_eval(tree, tmp_path, "all", *options, "--split", "2")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "esc10" / "results.json").is_file() and predictions_of(tmp_path / "ucf101") == before
    assert "ucf101 is finished already" in done.output and "esc10 is finished" not in done.output
    assert not (tmp_path / "charades").exists()  # it has no second split

    done = run_eval(tree, tmp_path / "visual", "all", *options, "--modality", "visual")
    assert done.exit_code == 1 and "1 of 4 tasks could not be evaluated" in done.output, done.output
    assert "not one test clip has picture" in done.output
    rows = [line for line in done.output.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == ["| ucf101", "| kinetics-sounds", "| charades"]


def test_another_protocol_or_recipe_replaces_nothing_until_forced(tree, tmp_path):
    assert run_eval(tree, tmp_path, "ucf101", *settings(QUICK), "--split", "2").exit_code == 0
    (tmp_path / "notes.txt").touch()
    before = times_of(tmp_path)
    knn = ("--protocol", "knn", "--split", "2", *settings(VIEWS))
    done = run_eval(tree, tmp_path, "ucf101", *knn)
    assert done.exit_code == 1 and 'protocol_name was "finetune" and is "knn"' in done.output, done.output
    assert "--force to begin anew" in done.output and len(done.output.splitlines()) == 1
    assert times_of(tmp_path) == before
    assert run_eval(tree, tmp_path, "ucf101", *knn, "--force").exit_code == 0
    assert results_of(tmp_path)["protocol"] == "knn" and (tmp_path / "notes.txt").exists()
    assert sorted(path.name for path in (tmp_path / "split-2").iterdir()) == ["predictions.jsonl", "shards.json"]
    done = run_eval(tree, tmp_path, "ucf101", *knn, "--recipe", "small", "--resume")
    assert done.exit_code == 1 and "protocol.test_crops was 3 and is 1" in done.output


@pytest.mark.parametrize(("protocol", "fields"), [("finetune", QUICK), ("knn", VIEWS)])
def test_run_again_it_says_that_it_is_finished_and_does_nothing(tree, tmp_path, protocol, fields):
    options = ("--protocol", protocol, "--split", "2", *settings(fields))
    first = run_eval(tree, tmp_path, "ucf101", *options)
    assert first.exit_code == 0, first.output
    before = times_of(tmp_path)
    for more in ((), ("--resume",), ("--set", "data.workers=1")):
        again = run_eval(tree, tmp_path, "ucf101", *options, *more)
        assert again.exit_code == 0, again.output
        assert f"{tmp_path} is finished already: nothing is left to do" in again.output
        assert f"{tmp_path}/results.json" in again.output and "resume" not in again.output
    assert times_of(tmp_path) == before
    (tmp_path / "results.json").write_text("{")  # made again from the predictions
    assert run_eval(tree, tmp_path, "ucf101", *options).exit_code == 0
    assert results_of(tmp_path)["protocol"] == protocol


def test_a_folder_of_something_else_is_left_alone(tree, tmp_path):
    (tmp_path / "results.json").write_text("mine")
    for more in ((), ("--force",)):
        done = run_eval(tree, tmp_path, "ucf101", "--protocol", "knn", "--split", "2", *settings(VIEWS), *more)
        assert done.exit_code == 1 and "holds results of no `avtrain eval`" in done.output, done.output
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_without_a_checkpoint_the_last_one_of_the_newest_run_is_taken(tree, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("eval", "--task", "ucf101", "--split", "2", "--protocol", "knn", "--shards", tree, "--device", "cpu",
               *settings(["data.workers=0", *VIEWS]))
    done = invoke(*options)
    assert done.exit_code == 1 and "no run of `avtrain pretrain` with a checkpoint under runs/" in done.output
    assert "--checkpoint FILE" in done.output and "--init random" in done.output
    for name in ("other/run", "newest"):
        folder = RunFolder(tmp_path / "runs" / name)
        write_settings(folder.path / "config.json", {})
        for step in (4, 12):
            folder.save(step, {}, lambda to: shutil.copy(checkpoint, to / "model.safetensors"), keep=3)
    taken = "runs/newest/checkpoints/step-000012/model.safetensors"
    done = invoke(*options)
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.output.splitlines()[0] == f"--checkpoint {taken}: the last one of the newest run under runs/"
    [out] = (tmp_path / "runs/eval").iterdir()
    assert results_of(out)["settings"]["checkpoint"] == taken


@pytest.mark.parametrize(("protocol", "fields"), [("linear", QUICK), ("knn", VIEWS)])
def test_validation_is_reported_and_changes_neither_test_nor_resumption(tree, tmp_path, protocol, fields):
    options = ("--protocol", protocol, "--validation", "0.3", *settings(fields))
    done = run_eval(tree, tmp_path, "kinetics-sounds", *options)
    assert done.exit_code == 0 and "validation of split 1: top-1" in done.output, done.output
    before = results_of(tmp_path)
    assert before["validation"]["1"]["top1"]["interval_95"][1] <= 100
    assert before["shards"]["1"]["videos"] == {"train": 6, "validation": 3, "test": 7, "unreadable": 0}
    assert "is finished already" in run_eval(tree, tmp_path, "kinetics-sounds", *options).output
    (tmp_path / "results.json").unlink()
    assert run_eval(tree, tmp_path, "kinetics-sounds", *options).exit_code == 0
    assert results_of(tmp_path) == before


def test_other_shards_or_precision_are_no_resumption(tree, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(tree / "kinetics-sounds", shards / "kinetics-sounds")
    options = ("--protocol", "knn", "--recipe", "small", *settings(VIEWS))
    assert run_eval(shards, tmp_path / "run", "kinetics-sounds", *options, "--precision", "float32").exit_code == 0
    done = run_eval(shards, tmp_path / "run", "kinetics-sounds", *options, "--precision", "bfloat16")
    assert done.exit_code == 1 and 'precision was "torch.float32" and is "torch.bfloat16"' in done.output
    for part, other in (("train", "test"), ("test", "train")):
        shutil.copytree(tree / "kinetics-sounds" / other, shards / "kinetics-sounds" / part, dirs_exist_ok=True)
    done = run_eval(shards, tmp_path / "run", "kinetics-sounds", *options, "--precision", "float32")
    assert done.exit_code == 1 and "begun with other settings: shards was" in done.output


@pytest.mark.parametrize(("task", "key", "group"), [
    ("ucf101", "v_HandstandPushups_g{}_c{}-0000", r"g(\d+)"), ("esc10", "3-{}-{}-0000", r"3-(\d+)"),
    ("kinetics-sounds", "video_{}-000{}", r"_(\d+)")])
def test_a_validation_part_never_splits_a_group(task, key, group):
    names = [key.format(10 + number // 4, "ABCD"[number % 4] if "esc" in task else number % 4) for number in range(80)]
    clips = rows_of(pa.Table.from_pylist([{"key": name, "labels": [0]} for name in names], schema=schema()), [80])
    learned, validation = (part.keys() for part in held_out(clips, 0.1, TASKS[task].group, 0))
    assert len(learned) == 72 and sorted(learned + validation) == sorted(clips.keys())
    groups = [{re.search(group, name)[1] for name in part} for part in (learned, validation)]
    assert not groups[0] & groups[1] and len(groups[1]) == 2
    assert [part.keys() for part in held_out(clips, 0.1, TASKS[task].group, 0)] == [learned, validation]


@pytest.mark.parametrize(("name", "content"), [
    ("settings.json", "{"), ("settings.json", "3"), ("split-2/shards.json", ""), ("split-2/predictions.jsonl", ""),
    ("split-2/predictions.jsonl", "{}"), ("split-2/predictions.jsonl", '{"video": "v", "labels": [0], "scores": [1]}'),
    ("split-2/predictions.jsonl", "half")])
def test_a_damaged_file_is_not_gone_on_with(tree, tmp_path, name, content):
    options = ("--protocol", "knn", "--split", "2", *settings(VIEWS))
    assert run_eval(tree, tmp_path, "ucf101", *options).exit_code == 0
    path, before = tmp_path / name, results_of(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1]) if content == "half" else content)  # half: one of two videos
    done = run_eval(tree, tmp_path, "ucf101", *options)
    assert done.exit_code == 1 and f"{path} is " in done.output, (done.output, done.exception)
    assert ("delete it" if "predictions" in name else "--force begins anew") in done.output
    assert results_of(tmp_path) == before
    assert run_eval(tree, tmp_path, "ucf101", *options, "--force").exit_code == 0
    assert results_of(tmp_path) == before


def test_settings_from_the_environment(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("AVTRAIN_EVAL_SET", "transfer.test_views=0 transfer.train_views=2")
    done = run_eval(tree, tmp_path, "ucf101", "--split", "2", network=[])
    assert done.exit_code == 1 and "transfer.test_views = 0: at least 1" in done.output, done.output


def test_a_damaged_shard_is_one_line_from_workers_too(tree, checkpoint, tmp_path):
    shutil.copytree(tree / "kinetics-sounds" / "test", tmp_path / "shards")
    [shard] = (tmp_path / "shards").glob("*.tar")
    shard.write_bytes(shard.read_bytes()[:30_000])
    for workers in (0, 2):
        done = invoke("embed", "--checkpoint", checkpoint, "--shards", tmp_path / "shards", "-o",
                      tmp_path / "f.parquet", "--cache", tmp_path / "cache", "--device", "cpu", "--set",
                      f"data.workers={workers}")
        [line] = [line for line in done.output.splitlines() if line.startswith("Error")]
        assert done.exit_code == 1 and f"{shard} has 30000 bytes, its index says" in line
        assert "Traceback" not in done.output


def test_embeddings_in_a_table(tree, checkpoint, tmp_path):
    folder = tree / "kinetics-sounds" / "test"
    (tmp_path / ".f.parquet.1.parquet").touch()
    done = invoke("embed", "--checkpoint", checkpoint, "--shards", folder, "-o", tmp_path / "f.parquet", "--device",
                  "cpu")
    assert done.exit_code == 0, done.output
    assert "what a killed run had left of it is removed, and it is begun again" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["f.parquet"]
    table = pq.read_table(tmp_path / "f.parquet")
    assert all(table.schema.field(name).type == pa.list_(pa.float32(), 32) for name in ("visual", "multimodal"))
    rows = table.to_pylist()
    assert f"{len(rows)} rows" in done.output
    long = sorted((row for row in rows if "long" in row["key"]), key=lambda row: row["time_s"])
    assert [row["time_s"] for row in long] == [2.0 * number for number in range(17)]
    assert all(row["labels"] == [0] and len(row["visual"]) == len(row["multimodal"]) == 32 for row in long)
    silent = [row for row in rows if "silent" in row["key"]]
    assert len(silent) == 6 and all(row["audio"] is None and row["visual"] is not None for row in silent)


def test_embedding_that_is_stopped_leaves_nothing(tree, checkpoint, tmp_path, monkeypatch):
    forward, left = AVBert.forward, [2]

    def stopped(*arguments):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr("avtrain.transfer.features._CLIPS_AT_ONCE", 2)
    monkeypatch.setattr("avtrain.transfer.embeddings._ROWS_A_GROUP", 2)
    monkeypatch.setattr(AVBert, "forward", stopped)
    done = invoke("embed", "--checkpoint", checkpoint, "--shards", tree / "kinetics-sounds" / "test", "-o",
                  tmp_path / "f.parquet", "--device", "cpu")
    assert done.exit_code == 130 and not list(tmp_path.iterdir())


def test_retrieval_finds_the_pitch_that_goes_with_a_colour(tree, checkpoint, tmp_path):
    done = invoke("retrieve", "--checkpoint", checkpoint, "--shards", tree / "kinetics-sounds", "-o",
                  tmp_path / "found.png", "--cache", tmp_path, "--device", "cpu")
    assert done.exit_code == 0, (done.output, done.exception)
    [sound, picture] = re.findall(r"recall@1 ([\d.]+) %", done.output)
    # Red has four clips with sound in the test, all alike: two of six are found by their colour, of the others some.
    assert float(sound) >= 30 and float(picture) >= 30
    assert (tmp_path / "found.png").stat().st_size > 10_000
