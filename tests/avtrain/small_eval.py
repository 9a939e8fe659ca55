"""`avtrain` as a user runs it, on a small network, for one short epoch; and what it leaves behind."""

import json
import shutil

from click.testing import CliRunner

from avtrain.cli import main

NETWORK = ["data.segment_frames=4", "data.crop=24", "data.scale=[24, 32]", "data.workers=0", "model.visual_width=8",
           "model.visual_blocks=[1, 1]", "model.audio_width=8", "model.audio_blocks=[1, 1]", "model.dimension=32",
           "model.feedforward=64", "model.layers=1", "model.rank=8"]
VIEWS = ["transfer.train_views=2", "transfer.test_views=3"]
QUICK = [*VIEWS, "transfer.epochs=1", "transfer.batch_size=4"]


def settings(values):
    return [part for value in values for part in ("--set", value)]


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run_eval(tree, out, task, *more, network=NETWORK):
    return invoke("eval", "--task", task, "--init", "random", "--preset", "tiny", "--shards", tree, "--out", out,
                  "--cache", tree / "features", "--device", "cpu", *settings(network), *more)


def results_of(out):
    return json.loads((out / "results.json").read_text())


def predictions_of(out):
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def times_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def put(video, *places):
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, place)


def build(avprep, dataset, raw, tree, split="all", *more):
    done = avprep("build", "--dataset", dataset, "--raw", raw, "--out", tree, "--split", split, "--workers", 1,
                  *more)
    assert done.returncode == 0, done.stderr
