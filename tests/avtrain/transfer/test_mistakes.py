"""Mistakes in calls of `avtrain eval`, `embed` and `retrieve`: each is answered in a line that says what is wrong."""

import json
import shutil

import pytest
import torch
from small_eval import NETWORK, build, invoke, put
from torch import nn

from avtrain.checkpoints.ours import save_model
from avtrain.config import read_config
from avtrain.models.avbert import AVBert

RANDOM, OURS, HEARD = ("--init", "random", "--preset", "tiny"), ("--checkpoint", "{ours}"), ("--checkpoint", "{heard}")


@pytest.fixture(scope="module")
def places(tree, checkpoint, avprep, tmp_path_factory):
    """Folders of shards and checkpoints, right and wrong, by the names that stand for them below."""
    root = tmp_path_factory.mktemp("wrong")
    return {"tree": tree, "ours": checkpoint, "none": root / "none.safetensors", "empty": root,
            "list": tree / "raw/ucf/ucfTrainTestlist/classInd.txt", **_checkpoints(root), **_shards(root, tree, avprep)}


def _checkpoints(root):
    for name in ("text.safetensors", "pickled.pyth"):
        (root / name).write_text("no checkpoint")
    config = read_config("tiny", [*NETWORK, "data.modality=audio"])
    save_model(root / "heard.safetensors", AVBert(config.model), config)
    diverged = AVBert(config.model)
    nn.init.constant_(diverged.audio_projection.bias, torch.nan)
    save_model(root / "diverged.safetensors", diverged, config)
    return {path.stem: path for path in root.iterdir()}


def _shards(root, tree, avprep):
    names = ("incomplete", "mixed", "other_order", "silent", "unlabelled")
    incomplete, mixed, other_order, silent, unlabelled = (root / name for name in names)
    for folder in (incomplete, mixed):
        shutil.copytree(tree / "kinetics-sounds" / "train", folder / "kinetics-sounds" / "train")
    shutil.copytree(tree / "ucf101" / "test2", mixed / "kinetics-sounds" / "test")
    shutil.copytree(tree / "kinetics-sounds", other_order / "kinetics-sounds")
    index = json.loads((other_order / "kinetics-sounds/test/index.json").read_text())
    index["classes"] = index["classes"][::-1]
    (other_order / "kinetics-sounds/test/index.json").write_text(json.dumps(index))
    put(tree / "raw/sounds/test/class0/silent.mp4", *(root / "mute" / split / "class0" / "a.mp4"
                                                      for split in ("train", "test")))
    build(avprep, "kinetics-sounds", root / "mute", silent)
    shutil.copytree(tree / "charades" / "train", unlabelled / "charades" / "train")
    raw, one = tree / "raw" / "charades", root / "raw"
    put(raw / "Charades/Charades_v1_classes.txt", one / "Charades/Charades_v1_classes.txt")
    (one / "Charades/Charades_v1_test.csv").write_text("id,actions\ntest0,\n")
    put(raw / "Charades_v1_480" / "test0.mp4", one / "Charades_v1_480" / "test0.mp4")
    build(avprep, "charades", one, unlabelled, "test")
    return {name: root / name for name in names}


@pytest.mark.parametrize(("arguments", "expected"), [
    (("ucf102", "{tree}", *RANDOM), "--task ucf102: known are ucf101"),
    (("ucf101", "{tree}", *OURS, "--init", "random"), "one of the two"),
    (("ucf101", "{tree}", *OURS, "--preset", "tiny"), "--preset tiny: goes with --init random"),
    (("ucf101", "{tree}", *OURS, "--protocol", "knn", "--set", "transfer.epochs=3"), "epochs: no such setting of"),
    (("ucf101", "{tree}", "--checkpoint", "{none}"), "No such file"),
    (("ucf101", "{tree}", "--checkpoint", "{text}"), "not a checkpoint of avtrain"),
    (("ucf101", "{tree}", "--checkpoint", "{pickled}"), "not a checkpoint that can be read safely"),
    (("ucf101", "{tree}", "--checkpoint", "{list}"), "not a checkpoint that"),
    (("esc10", "{tree}", "--checkpoint", "{diverged}"), "its training diverged"),
    (("ucf101", "{tree}", *OURS, "--set", "transfer.head_rate=1e38"), "at most 100 is wanted"),
    (("ucf101", "{tree}", *OURS, "--validation", "nan"), "Invalid value for '--validation': nan is no number"),
    (("ucf101", "{tree}", *OURS, "--split", "4"), "--split 4: ucf101 has 1, 2, 3"),
    (("kinetics-sounds", "{incomplete}", *OURS), "avprep build --dataset kinetics-sounds --split test"),
    (("esc50", "{tree}", *OURS), "avprep build --dataset esc50 --split fold"),
    (("kinetics-sounds", "{mixed}", *OURS), "spec differ"),
    (("kinetics-sounds", "{other_order}", *OURS), "classes differ"),
    (("kinetics-sounds", "{silent}", *OURS, "--modality", "audio"), "which --modality audio needs"),
    (("charades", "{tree}", *OURS, "--set", "transfer.loss=hinge"), "several labels"),
    (("ucf101", "{tree}", *OURS), "avprep build --dataset ucf101 --split train1"),
    (("ucf101", "{tree}", *OURS, "--set", "transfer.epoch=1"), "did you mean transfer.epochs"),
    (("ucf101", "{tree}", *OURS, "--set", "model.rank=4"), "only transfer.* and data.* can be set"),
    (("ucf101", "{tree}", *RANDOM, "--set", "training.steps=4"), "only transfer.* and data.* and model.* can be"),
    (("ucf101", "{tree}", *OURS, "--set", "data.noise=[-5, -3]"), "data.noise: no such setting here"),
    (("ucf101", "{tree}", *RANDOM, "--set", "data.segments=4"), "data.segments: no such setting here"),
    (("kinetics-sounds", "{tree}", *HEARD), "a visual CNN would be needed, and it has learned only an audio CNN"),
    (("charades", "{unlabelled}", *OURS), "not one test clip has a label"),
    (("kinetics-sounds", "{tree}", *OURS, "--set", "transfer.test_views=30"), "positions for 21 segments"),
    (("ucf101", "{tree}", *OURS, "--split", "2", "--set", "data.mels=40"), "mel_bands 80"),
    (("all", "{empty}", *OURS), "no task has all shards"),
])
def test_mistakes_of_eval_are_answered_in_a_line(places, tmp_path, arguments, expected):
    task, shards, *more = (argument.format(**places) for argument in arguments)
    done = invoke("eval", "--task", task, "--shards", shards, "--out", tmp_path / "run", "--device", "cpu", *more)
    assert done.exit_code in (1, 2) and expected in done.output, (done.output, done.exception)


@pytest.mark.parametrize(("command", "options", "expected"), [
    ("embed", ("--shards", "{tree}/ucf101/test2", *OURS, "--set", "data.time_mask=0"), "no such setting"),
    ("embed", ("--shards", "{tree}/ucf101/test2", *OURS, "--set", "data.segments=22"), "at most"),
    ("embed", ("--shards", "{tree}/ucf101/test2", *HEARD, "--set", "data.modality=both"), "a visual CNN"),
    ("embed", ("--shards", "{tree}/ucf101/test2", *OURS, "-o", "f.csv"), "ends in .parquet is wanted"),
    ("embed", ("--shards", "{tree}/ucf101/test2", "--shards", "{tree}/raw/../ucf101/test2/index.json", *OURS),
     "the same shards twice"),
    ("retrieve", ("--shards", "{tree}/kinetics-sounds", *HEARD), "a visual CNN would be needed"),
    ("retrieve", ("--shards", "{tree}/kinetics-sounds/test", *OURS), "the folder of a dataset with"),
    ("retrieve", ("--shards", "{tree}/kinetics-sounds", *OURS, "-o", "f"), "ends in .png is wanted"),
])
def test_mistakes_of_embed_and_retrieve_are_answered_in_a_line(places, tmp_path, command, options, expected):
    output = tmp_path / ("output.parquet" if command == "embed" else "output.png")
    done = invoke(command, "-o", output, "--device", "cpu", *(option.format(**places) for option in options))
    assert done.exit_code == 1 and expected in done.output, (done.output, done.exception)
