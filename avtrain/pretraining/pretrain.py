"""Pretraining: puts model, objectives, data and engine together (paper, section 3)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from avtrain.checkpoints.ours import save_model
from avtrain.config import Config, config_from, config_to
from avtrain.data.clips import ClipDataset
from avtrain.data.handover import check_room
from avtrain.data.loader import Batch, Epochs
from avtrain.data.order import Wanted, at_epoch, batches_of, epoch_order
from avtrain.data.shards import ShardFolder, open_folders
from avtrain.engine import Run
from avtrain.errors import AvtrainError
from avtrain.files import written_whole
from avtrain.models.avbert import AVBert
from avtrain.pretraining.held_out import HeldOut
from avtrain.pretraining.objectives import Objectives
from avtrain.runtime import Runtime, seed_everything

_CONFIG = "config.json"
_START_CLIPS = 8  # that the projections' start values are taken from


def epochs_of(folder: ShardFolder, config: Config) -> Epochs:
    """Every clip once an epoch, in the order that the seed gives."""
    training, clips = config.training, folder.clips_of_shards
    size = training.batch_size // training.accumulate

    def of_epoch(epoch: int) -> Iterator[list[Wanted]]:
        return at_epoch(batches_of(epoch_order(clips, training.seed, epoch, config.data.shards_at_once), size), epoch)

    return Epochs(ClipDataset(folder, config.data, training.seed), of_epoch, -(-folder.clips // size), folder.clips,
                  config.data.workers)


def pretrain(config: Config, train: list[str], test: list[str], out: Path, runtime: Runtime, resume: bool = False,
             max_steps: int | None = None, max_time_s: float | None = None) -> Run:
    """Pretrain a model from scratch, or go on with a run.

    Args:
        config: all settings; a resumed run must have the same ones.
        train, test: folders of shards; without `test` nothing is held out.
        out: folder of the run.
        runtime: device and precision.
        resume: go on from the last checkpoint in `out`.
        max_steps, max_time_s: stop there, with a checkpoint, though the schedule goes on.

    Raises:
        AvtrainError: data and settings don't fit, or the run's folder is not as `resume` says.
    """
    _check_folder(out, config, resume)
    generator = seed_everything(config.training.seed)
    model = AVBert(config.model).to(runtime.device)
    objectives = Objectives(config.model, config.objectives).to(runtime.device)
    train_folder = open_folders(train, labelled=False)
    supply = epochs_of(train_folder, config)
    held_out = HeldOut(open_folders(test, labelled=False), config, runtime) if test else None
    check_room(supply.in_flight_bytes() + (held_out.in_flight_bytes() if held_out else 0))
    run = Run(out, {"model": model, "objectives": objectives}, config.training, generator,
              lambda folder: save_model(folder / "model.safetensors", model, config))
    if resume:
        run.resume()
    else:
        first = _tensors(next(supply.starting_at(0, 0)), runtime)
        model.standardize(*(tensor[:_START_CLIPS] for tensor in first))
        with written_whole(out / _CONFIG) as temporary:
            temporary.write_text(json.dumps(config_to(config), indent=1) + "\n", encoding="utf-8")

    def step(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        result = objectives(model, model.embed(*_tensors(batch, runtime)), generator)
        return result.loss, {name: float(value) for name, value in result.figures().items()}

    def evaluate() -> dict[str, float]:
        return held_out.figures(model, objectives) if held_out else {}

    model.train()
    objectives.train()
    run.train(step, supply, runtime.autocast, evaluate, max_steps, max_time_s)
    return run


def _tensors(batch: Batch, runtime: Runtime) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The batch on the device.

    Raises:
        AvtrainError: there is nothing in it.
    """
    if not batch.keys:
        raise AvtrainError(f"not one clip of a batch could be decoded; the first: {batch.unreadable[0]}")
    return batch.tensors(runtime.device)


def _check_folder(out: Path, config: Config, resume: bool) -> None:
    path = out / _CONFIG
    if not resume:
        if (out / "checkpoints").exists():
            raise AvtrainError(f"{out} holds a run already: go on with --resume, or choose another folder with --out")
        return
    if not path.is_file():
        raise AvtrainError(f"--resume: no run in {out}")
    before = config_from(json.loads(path.read_text(encoding="utf-8")), str(path))
    # How batches are made does not change them.
    same = replace(before, data=replace(before.data, workers=config.data.workers))
    if same != config:
        raise AvtrainError(f"--resume: the settings differ from those in {path}; use the same preset and --set options")
