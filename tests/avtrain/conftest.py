"""Fixtures: the shared reference data, the authors' weights redrawn by its rules, shards of tasks to transfer to."""

from __future__ import annotations

import csv
import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from redrawn import drawn
from small_eval import NETWORK, build, put
from torch import Tensor

from avtrain.checkpoints.ours import save_model
from avtrain.config import read_config
from avtrain.models.avbert import AVBert

EXCERPTS = Path(__file__).parents[1] / "reference"


@pytest.fixture(scope="session")
def released_state() -> dict[str, Tensor]:
    """The state dict of the authors' Kinetics-Sounds model, redrawn."""
    state = {}
    with gzip.open(EXCERPTS / "avbert_state_dict.csv.gz", "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            shape = tuple(int(size) for size in row["shape"].split("x") if size)
            state[row["name"]] = drawn(row["name"], shape, "weight").to(getattr(torch, row["dtype"]))
    return state


@pytest.fixture(scope="module")
def reference(reference_folder: Path) -> dict[str, np.ndarray]:
    """What the authors' code computed, by name; of the excerpt some values in a line, a step apart."""
    with np.load(reference_folder / "avbert_outputs.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def all_kinds(videos, ffmpeg, avprep, tmp_path_factory):
    """20 sources in several shards: 4 s, 34 s, 1 s, silent, sound alone."""
    root = tmp_path_factory.mktemp("all_kinds")
    (root / "raw").mkdir()
    for copy, name in enumerate(["normal0", "normal1", "normal2", "silent0", "silent1", "short0"] * 3):
        shutil.copy(videos / f"{name}.mp4", root / "raw" / f"{name}-{copy}.mp4")
    shutil.copy(videos / "long0.mp4", root / "raw")
    ffmpeg("-f", "lavfi", "-i", "sine=300:r=44100", "-t", 6, root / "raw" / "heard.wav")
    done = avprep("build", "--dataset", "folder", "--raw", root / "raw", "--out", root, "--shard-mb", 0.1, "--fps", 8,
                  "--workers", 1)
    assert done.returncode == 0, done.stderr
    return root / "folder" / "train"


@pytest.fixture(scope="session")
def tree(videos, avprep, tmp_path_factory):
    """Shards like UCF101 (15 fps; Cricket has no test clips, one video is too short for ten clips), Kinetics-Sounds
    (one video a class without sound, one of 34 s) and Charades."""
    root = tmp_path_factory.mktemp("transfer")
    ucf = root / "raw" / "ucf"
    lists = ucf / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    names, train, test = ["Archery", "Bowling", "Cricket"], [], []
    (lists / "classInd.txt").write_text("".join(f"{number + 1} {name}\n" for number, name in enumerate(names)))
    for index, name in enumerate(names):
        for group in range(1, 4):
            path = f"{name}/v_{name}_g{group:02d}_c01.avi"
            put(videos / ("short0.mp4" if index == 0 and group in (1, 3) else f"normal{index}.mp4"),
                ucf / "UCF-101" / path)
            (test if group == 3 and index < 2 else train).append(path)
    (lists / "trainlist02.txt").write_text("".join(f"{path} 1\n" for path in train))
    (lists / "testlist02.txt").write_text("".join(f"{path}\n" for path in test))
    for split in ("train2", "test2"):
        build(avprep, "ucf101", ucf, root, split, "--fps", 15)

    sounds = root / "raw" / "sounds"
    for index in range(3):
        put(videos / f"normal{index}.mp4", *(sounds / "train" / f"class{index}" / f"{n}.mp4" for n in range(2)),
            sounds / "test" / f"class{index}" / "t.mp4")
        put(videos / f"silent{index}.mp4", sounds / "train" / f"class{index}" / "silent.mp4",
            sounds / "test" / f"class{index}" / "silent.mp4")
    put(videos / "long0.mp4", sounds / "test" / "class0" / "long.mp4")
    build(avprep, "kinetics-sounds", sounds, root)

    charades = root / "raw" / "charades"
    (charades / "Charades").mkdir(parents=True)
    (charades / "Charades/Charades_v1_classes.txt").write_text("c000 Holding\nc001 Sitting\nc002 Flying\nc003 Eating\n")
    rows = {"train": ["c000 0 6;c001 1 3", "c001 0 5", "c000 0 2;c002 0 4", "", "c002 1 6"],
            "test": ["c000 0 6", "c001 0 6;c000 1 2", "c001 2 4"]}
    for split, actions in rows.items():
        lines = [f"{split}{number},{of_video}\n" for number, of_video in enumerate(actions)]
        (charades / "Charades" / f"Charades_v1_{split}.csv").write_text("id,actions\n" + "".join(lines))
        for number in range(len(actions)):
            put(videos / f"normal{number % 3}.mp4", charades / "Charades_v1_480" / f"{split}{number}.mp4")
    build(avprep, "charades", charades, root)
    return root


@pytest.fixture(scope="module")
def tree_with_esc10(tree, esc10, avprep, tmp_path_factory):
    """The same with ESC-10: a recording of two classes in every fold."""
    root = tmp_path_factory.mktemp("transfer_and_esc10")
    for name in ("001 - Dog bark", "002 - Rain"):
        for fold in "12345":
            for path in sorted((esc10 / name).glob(f"{fold}-*.ogg"))[:1]:
                put(path, root / "raw" / "esc10" / name / path.name)
    build(avprep, "esc10", root / "raw" / "esc10", root)
    for name in ("ucf101", "kinetics-sounds", "charades"):
        shutil.copytree(tree / name, root / name)
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The file of a network of ours."""
    config = read_config("tiny", NETWORK)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_model(path, AVBert(config.model), config)
    return path
