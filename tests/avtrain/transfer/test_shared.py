"""`embed` and `eval` in several processes: each does its part, and what comes out is what one process makes."""

import json

import pytest
from forked import forked
from small_eval import NETWORK, invoke, predictions_of, settings

SMALL = ["eval", "--init", "random", "--preset", "tiny", "--device", "cpu", "--split", "2", *settings(NETWORK)]
# Three clips of two classes and three of which two are too short: 2 steps of 4 views an epoch.
TUNED = [*SMALL, "--task", "ucf101", "--precision", "float64", "--protocol", "finetune", "--validation", "0.3",
         *settings(["transfer.train_views=3", "transfer.test_views=2", "transfer.epochs=3", "transfer.batch_size=4",
                    "transfer.dropout=0", "model.dropout=0"])]


def losses_of(out):
    lines = [json.loads(line) for line in (out / "split-2" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name in ("step", "loss", "gradient_norm")
             or name.startswith("validation_")} for line in lines]


def agree(one, other, within):
    assert one and len(one) == len(other)
    for ours, theirs in zip(one, other, strict=True):
        assert ours == pytest.approx(theirs, rel=within, abs=within)


def predictions_agree(one, other, within=1e-6):
    assert [line["video"] for line in one] == [line["video"] for line in other]
    for ours, theirs in zip(one, other, strict=True):
        assert ours["scores"] == pytest.approx(theirs["scores"], abs=within)


@pytest.mark.slow
def test_embeddings_and_features_are_those_of_one_process(tree, checkpoint, tmp_path):
    def embed(ranks):
        return ranks, ["embed", "--checkpoint", checkpoint, "--shards", tree / "kinetics-sounds/train", "--shards",
                       tree / "kinetics-sounds/test", "-o", tmp_path / f"{ranks}.parquet", "--device", "cpu"]

    def probe(ranks, protocol):
        return ranks, [*SMALL, "--task", "ucf101", "--protocol", protocol, "--shards", tree, "--cache",
                       tmp_path / f"features{ranks}", "--out", tmp_path / f"{protocol}{ranks}", "--validation", "0.3",
                       *settings(["transfer.train_views=2", "transfer.test_views=3"])]

    small = "import avtrain.transfer.features as features; features._CLIPS_AT_ONCE = features._SEGMENTS_AT_ONCE = 2"
    asked = [(*embed(ranks), small) for ranks in (1, 2, 3)]
    asked += [(*probe(ranks, protocol), small) for ranks in (1, 2) for protocol in ("linear", "knn")]
    for codes, printed in forked(*asked):
        assert set(codes) == {0}, printed
        assert printed.count("rows in") + printed.count("results.json") == 1  # one of them speaks
    tables = [(tmp_path / f"{ranks}.parquet").read_bytes() for ranks in (1, 2, 3)]
    assert tables[0] == tables[1] == tables[2]
    features = [sorted((tmp_path / f"features{ranks}").iterdir()) for ranks in (1, 2)]
    assert len(features[0]) > 2 and [path.name for path in features[0]] == [path.name for path in features[1]]
    for one, other in zip(*features, strict=True):
        assert one.read_bytes() == other.read_bytes()
    for protocol in ("linear", "knn"):
        for name in ("results.json", "predictions.jsonl", "split-2/validation.jsonl"):
            one, other = ((tmp_path / f"{protocol}{ranks}" / name).read_text() for ranks in (1, 2))
            assert one == other, (protocol, name)


@pytest.mark.slow
def test_finetuning_is_that_of_one_process_and_goes_on_with_any_number(tree, tmp_path):
    def tune(ranks, out, *more):
        return ranks, [*TUNED, "--shards", tree, "--out", tmp_path / out, *more]

    stop = ("import os, signal\nfrom avtrain.engine import Run\nbefore = Run._step\ndef step(run, *rest):\n"
            "    found = before(run, *rest)\n    if run.position.step == 3 and rank == 1:\n"
            "        os.kill(os.getpid(), signal.SIGTERM)\n    return found\nRun._step = step\n")
    parts = settings(["transfer.micro_batch=1"])
    found = forked(tune(1, "one"), tune(2, "two"), (*tune(2, "stopped"), stop), tune(1, "stopped"),
                   tune(1, "parts1", *settings(["transfer.micro_batch=2"])), tune(2, "parts2", *parts))
    codes = [codes for codes, _ in found]
    assert codes == [[0], [0, 0], [143, 143], [0], [0], [0, 0]], "\n".join(printed for _, printed in found)
    assert found[2][1].count("stopped by SIGTERM at step 3") == 1
    for one, other in (("one", "two"), ("one", "stopped"), ("parts1", "parts2")):
        agree(losses_of(tmp_path / one), losses_of(tmp_path / other), 1e-8)
        predictions_agree(predictions_of(tmp_path / one), predictions_of(tmp_path / other))
        for name in ("predictions.jsonl", "split-2/validation.jsonl"):
            assert (tmp_path / other / name).is_file()


@pytest.mark.slow
def test_sequences_of_all_kinds_are_finetuned_as_by_one_process(tree, tmp_path):
    """Videos without sound, in a batch of which a process may have no other."""
    def tune(ranks, out, *more):
        options = settings(["transfer.train_views=2", "transfer.test_views=2", "transfer.epochs=2",
                            "transfer.batch_size=4", "transfer.dropout=0", "model.dropout=0"])
        return ranks, ["eval", "--init", "random", "--preset", "tiny", "--device", "cpu", *settings(NETWORK), "--task",
                       "kinetics-sounds", "--precision", "float64", "--shards", tree, "--out", tmp_path / out, *options,
                       *more]

    # Those of one video can't be decoded: one process has nothing for a while.
    lost = ("from avtrain.data import clips, loader\nloader.MOST_UNREADABLE = 0.9\nfill = clips.ClipDataset._fill\n"
            "def fails(self, row, *rest):\n    if 'silent' in row.key or 'class2' in row.key:\n"
            "        raise ValueError('lost')\n    fill(self, row, *rest)\nclips.ClipDataset._fill = fails\n"
            "import avtrain.transfer.evaluate as evaluate\nevaluate.MOST_UNREADABLE = 0.9\n")
    found = forked(tune(1, "one"), tune(4, "four"), (*tune(1, "lost1"), lost), (*tune(4, "lost4"), lost))
    assert [set(codes) for codes, _ in found] == [{0}] * 4, "\n".join(printed for _, printed in found)
    for one, other in (("one", "four"), ("lost1", "lost4")):
        logs = [(tmp_path / name / "split-1" / "metrics.jsonl").read_text() for name in (one, other)]
        lines = [[json.loads(line)["loss"] for line in log.splitlines()] for log in logs]
        assert len(lines[0]) > 3 and lines[0] == pytest.approx(lines[1], rel=1e-8)
        predictions_agree(predictions_of(tmp_path / one), predictions_of(tmp_path / other))


@pytest.mark.slow
def test_a_process_that_fails_hangs_nobody_and_leaves_nothing(tree, checkpoint, tmp_path):
    """Where it makes outputs; where the first one writes; and over all tasks the others are still evaluated."""
    lost = ("from avtrain.errors import AvtrainError\nimport avtrain.transfer.features as features\n"
            "features._CLIPS_AT_ONCE = features._SEGMENTS_AT_ONCE = 2\ncheck, seen = features._check_finite, []\n"
            "def fails(name, tensor, keys):\n    seen.append(keys)\n"
            "    if rank == WHO and len(seen) > 3:\n        raise AvtrainError(f'{keys[0]}: made up')\n"
            "    check(name, tensor, keys)\nfeatures._check_finite = fails\n")
    full = ("import avtrain.transfer.embeddings as embeddings\ndef fails(*rest):\n"
            "    raise OSError(28, 'No space left on device', 'made-up')\nembeddings._rows = fails\n")
    embed = ["embed", "--checkpoint", checkpoint, "--shards", tree / "kinetics-sounds/train", "--device", "cpu"]
    every = [argument for argument in SMALL if argument not in ("--split", "2")]
    every += ["--task", "all", "--protocol", "knn", "--shards", tree, "--cache", tmp_path / "features", "--out",
              tmp_path / "all", *settings(["transfer.train_views=2", "transfer.test_views=3"])]
    once = ("import avtrain.transfer.evaluate as evaluate\nfrom avtrain.errors import AvtrainError\n"
            "views = evaluate.view_features\ndef made(model, folder, *rest):\n"
            "    if rank == 0 and len(folder.classes) == 4:\n        evaluate._probe = fails_probe\n"
            "    return views(model, folder, *rest)\ndef fails_probe(*rest):\n    evaluate._probe = probe\n"
            "    raise AvtrainError('made up')\nprobe = evaluate._probe\nevaluate.view_features = made\n")
    found = forked((2, [*embed, "-o", tmp_path / "a.parquet"], lost.replace("WHO", "1")),
                   (2, [*embed, "-o", tmp_path / "b.parquet"], lost.replace("WHO", "0")),
                   (2, [*embed, "-o", tmp_path / "c.parquet"], full), (2, every, once))
    assert [codes for codes, _ in found] == [[1, 1]] * 4, found
    assert "process 1 can't go on: " in found[0][1] and found[0][1].count("made up") == 2
    assert "process 0" not in found[1][1] and found[1][1].count("made up") == 1
    assert "made-up: No space left on device" in found[2][1] and all("Traceback" not in text for _, text in found)
    assert list(tmp_path.glob("*.parquet")) + list(tmp_path.glob(".*")) == []
    assert "charades: made up" in found[3][1] and "| kinetics-sounds |" in found[3][1]


def test_what_runs_in_one_process_says_so(checkpoint, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    for command in (["retrieve", "--checkpoint", checkpoint], ["report", "runs"], ["params"]):
        done = invoke(*command)
        assert done.exit_code == 1 and "runs in one process, and 2 were started" in done.output
        assert len(done.output.splitlines()) == 1
