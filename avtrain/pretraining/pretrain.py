"""Pretraining: puts model, objectives, data and engine together (paper, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from avtrain.checkpoints.ours import save_model
from avtrain.config import Config, config_from, config_to
from avtrain.data.clips import ClipDataset
from avtrain.data.handover import check_room
from avtrain.data.loader import Batch, Epochs
from avtrain.data.order import Wanted, at_epoch, batches_of, epoch_order
from avtrain.data.shards import ShardFolder, open_folders
from avtrain.engine import Run, last_step
from avtrain.errors import AvtrainError
from avtrain.models.graphs import capture, own_gradients
from avtrain.pretraining.draw import draw_for
from avtrain.pretraining.held_out import HeldOut
from avtrain.pretraining.module import Pretraining
from avtrain.pretraining.objectives import ObjectiveResult
from avtrain.pretraining.optimizer import pretraining_optimizer
from avtrain.run_folder import CONFIG, RunFolder, check_settings, delete, read_settings, write_settings
from avtrain.runtime import Runtime, seed_everything

_INPUTS = "inputs.json"
_START_CLIPS = 8  # that the projections' start values are taken from


def epochs_of(folder: ShardFolder, config: Config) -> Epochs:
    """Every clip once an epoch, in the order that the seed gives."""
    training, clips = config.training, folder.clips_of_shards
    size = training.batch_size // training.accumulate

    def of_epoch(epoch: int) -> Iterator[list[Wanted]]:
        return at_epoch(batches_of(epoch_order(clips, training.seed, epoch, config.data.shards_at_once), size), epoch)

    return Epochs(ClipDataset(folder, config.data, training.seed), of_epoch, -(-folder.clips // size), folder.clips,
                  config.data.workers)


class Pretrained(NamedTuple):
    """What a call of `pretrain` came to.

    Attributes:
        folder: of the run.
        step: that it is at.
        made: steps of this call; 0 where the run was there already.
        bad_steps: the last ones, in a row, that were not finite; the last checkpoint is from before them.
    """

    folder: RunFolder
    step: int
    made: int
    bad_steps: int


def pretrain(config: Config, train: list[str], test: list[str], out: Path, runtime: Runtime, force: bool = False,
             max_steps: int | None = None, max_time_s: float | None = None) -> Pretrained:
    """Pretrain a model from scratch, or go on with the run in `out` from its last checkpoint.

    Args:
        config: all settings; a run that is gone on with must have the same ones.
        train, test: folders of shards; without `test` nothing is held out.
        out: folder of the run.
        runtime: device and precision.
        force: begin anew; what an earlier run wrote is deleted.
        max_steps, max_time_s: stop there, with a checkpoint, though the schedule goes on.

    Raises:
        AvtrainError: data and settings don't fit, or the run in `out` was begun with others.
    """
    train_folder = open_folders(train, labelled=False)
    test_folder = open_folders(test, labelled=False) if test else None
    folder = RunFolder(out)
    inputs = {"precision": str(runtime.autocast_dtype or torch.float32), "train_shards": train_folder.fingerprint,
              "test_shards": test_folder.fingerprint if test_folder else None}
    if force:
        _clear(folder)
    _check_same(folder, config, inputs)
    begun = folder.last_step()
    if begun >= last_step(config.training, max_steps):
        return Pretrained(folder, begun, 0, 0)
    seed_everything(config.training.seed)
    network = Pretraining(config).to(runtime.device)
    supply = epochs_of(train_folder, config)
    held_out = HeldOut(test_folder, config, runtime) if test_folder else None
    check_room(supply.in_flight_bytes() + (held_out.in_flight_bytes() if held_out else 0))
    modules: dict[str, nn.Module] = {"model": network.model, "objectives": network.objectives}
    run = Run(folder, modules, pretraining_optimizer(modules, config.training), config.training,
              lambda to: save_model(to / "model.safetensors", network.model, config))
    network.train()
    if config.training.cuda_graphs and runtime.device.type == "cuda":
        _capture(network, config, runtime)
    if not run.go_on():
        first = _filled(next(supply.starting_at(0, 0))).tensors(runtime.device)
        network.model.standardize(*(tensor[:_START_CLIPS] for tensor in first))
        write_settings(out / _INPUTS, inputs)
        write_settings(out / CONFIG, config_to(config))

    def step(batch: Batch, part: int) -> tuple[Tensor, dict[str, Tensor]]:
        draw = draw_for(_filled(batch), config, part, config.training.seed, run.position.step).to(runtime.device)
        result: ObjectiveResult = network(*batch.tensors(runtime.device), draw)
        return result.loss, result.figures()

    def evaluate() -> dict[str, float]:
        return held_out.figures(network) if held_out else {}

    run.train(step, supply, runtime.autocast, evaluate, max_steps, max_time_s)
    return Pretrained(folder, run.position.step, run.position.step - begun, run.bad_steps)


def _capture(network: Pretraining, config: Config, runtime: Runtime) -> None:
    """Graphs of parts whose clips all have all their segments."""
    data, device = config.data, runtime.device
    shape = (config.training.batch_size // config.training.accumulate, data.segments)
    visual = torch.randint(0, 256, (*shape, 3, data.segment_frames, data.crop, data.crop), dtype=torch.uint8,
                           device=device)
    audio = torch.randn(*shape, 1, data.mels, data.mel_frames, device=device)
    capture(network.model, visual, audio, config.objectives.draws, runtime.autocast_dtype, transformers=True)
    own_gradients(network)


def _filled(batch: Batch) -> Batch:
    """The batch.

    Raises:
        AvtrainError: there is nothing in it.
    """
    if not batch.keys:
        raise AvtrainError(f"not one clip of a batch could be decoded; the first: {batch.unreadable[0]}")
    return batch


def _check_same(folder: RunFolder, config: Config, inputs: dict[str, str | None]) -> None:
    """Raise where there is something to go on with, and it was begun with other settings, data or precision.

    Before its first whole checkpoint a run has nothing that would be lost: it is begun again, with any settings.
    """
    checkpoint = folder.last_checkpoint()
    if checkpoint is None:
        return
    path, of_inputs = folder.path / CONFIG, folder.path / _INPUTS
    if not path.is_file():
        raise AvtrainError(f"{checkpoint} is of no run of `avtrain pretrain`, for {path} is not there: choose another "
                           "folder with --out")
    before = config_to(config_from(read_settings(path), str(path)))
    before["data"]["workers"] = config.data.workers  # how batches are made does not change them
    before["training"]["log_every"] = config.training.log_every  # nor does what is logged
    # Runs of earlier versions have not written down their inputs.
    before |= read_settings(of_inputs) if of_inputs.is_file() else inputs
    check_settings(folder.path, before, config_to(config) | inputs)


def _clear(folder: RunFolder) -> None:
    """Delete what a run wrote; its settings last, by which it is known to be one."""
    if (folder.path / CONFIG).is_file():
        folder.clear()
        delete(folder.path / name for name in ("report.html", "report.png", _INPUTS, CONFIG))
