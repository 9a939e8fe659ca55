"""What a run has learned, by what anyone can run: held-out figures, linear classifiers, retrieval."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from avtrain.config import Config
from avtrain.data.shards import open_folders
from avtrain.errors import AvtrainError
from avtrain.pretraining.pretrain import pretrain
from avtrain.run_folder import RunFolder
from avtrain.runtime import Runtime
from avtrain.transfer.evaluate import Trial, evaluate_task
from avtrain.transfer.protocols import protocol_for
from avtrain.transfer.retrieval import retrieve
from avtrain.transfer.start import Start, load_source

NEIGHBOURS = 5


def add_force(parser: argparse.ArgumentParser) -> None:
    """--force: a report that is run again goes on with what is in --out."""
    parser.add_argument("--force", action="store_true", help="begin anew: delete what an earlier run wrote to --out")


def in_one_line(report: Callable[[], None]) -> None:
    """Run a report; what is wrong for a person to put right is one line."""
    try:
        report()
    except AvtrainError as error:
        sys.exit(f"Error: {error}")


def trained(config: Config, train: list[Path], test: list[Path], folder: Path, runtime: Runtime,
            force: bool = False) -> Path:
    """The last checkpoint of a run with these settings and shards; begun, gone on with, or found finished."""
    run = pretrain(config, [str(path) for path in train], [str(path) for path in test], folder, runtime, force)
    print(f"{folder}: {'trained already' if run.made == 0 else f'trained, {run.made} steps in this run'}", flush=True)
    checkpoint = run.folder.last_checkpoint()
    assert checkpoint is not None
    return checkpoint / "model.safetensors"


def trained_on_demo(config: Config, shards: Path, folder: Path, runtime: Runtime, force: bool) -> Path:
    """`trained` on the demo's training split, with its test split held out."""
    return trained(config, [shards / "train"], [shards / "test"], folder, runtime, force)


def minutes_of(folder: Path, config: Config) -> float:
    """How long the steps of a run took, without start, evaluations and checkpoints."""
    return sum(config.training.batch_size / line["clips_per_s"] for line in RunFolder(folder).lines()) / 60


def held_out_figures(folder: Path) -> dict[str, float]:
    """Pair accuracy, masked top-1 by Transformer and modality, and chance_* of each, from the last evaluation."""
    return {name.removeprefix("test_"): value for name, value in RunFolder(folder).last_figures().items()
            if name.removeprefix("test_").removeprefix("chance_").startswith(("masked_top1", "pair_accuracy"))}


def probe(source: Start, modality: str, shards: Path, folder: Path, seed: int, runtime: Runtime,
          force: bool) -> float:
    """Top-1, in parts of 1, of a linear classifier on frozen embeddings."""
    return float(transferred(source, "linear", modality, shards, folder, seed, runtime, force)["percent"]) / 100


def transferred(source: Start, protocol: str, modality: str, shards: Path, folder: Path, seed: int,
                runtime: Runtime, force: bool) -> dict[str, Any]:
    """Top-1 of `avtrain eval --task demo --recipe small`: "percent" and "interval_95"."""
    trial = Trial("demo", protocol_for("demo", protocol, "small"), modality, seed=seed)
    out = folder / f"{protocol}-{modality}"
    done = evaluate_task(source, trial, ["1"], str(shards.parent), out, folder / "features", runtime, force)
    top1: dict[str, Any] = done.results["mean"]["top1"]
    return top1


def recalls(checkpoint: Path, shards: Path, folder: Path, runtime: Runtime) -> tuple[float, float, float]:
    """Recall at 5 among all test clips, from sound to picture and back, and what chance gives."""
    source = load_source(checkpoint)
    train, test = (open_folders([str(shards / split)]) for split in ("train", "test"))
    found = retrieve(source.model, train, test, source.data, runtime, folder / "features")
    return found.recall(NEIGHBOURS, True), found.recall(NEIGHBOURS, False), NEIGHBOURS / len(found.keys)
