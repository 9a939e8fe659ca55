"""Pretraining: puts model, objectives, data and engine together (paper, section 3)."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from avtrain import ranks
from avtrain.checkpoints.ours import save_model
from avtrain.config import Config, config_from, config_to
from avtrain.data.cache import check_limit
from avtrain.data.clips import ClipDataset
from avtrain.data.handover import check_room
from avtrain.data.loader import Batch, Epochs, clips_of_piece
from avtrain.data.order import ClipPlace, Wanted, cut_of, epoch_order
from avtrain.data.shards import open_folders
from avtrain.data.storage import is_remote
from avtrain.data.stream import Streams, stream_order
from avtrain.engine import Run, last_step
from avtrain.errors import AvtrainError
from avtrain.models.graphs import capture, own_gradients
from avtrain.pretraining.draw import Draw, draws_of, planned
from avtrain.pretraining.held_out import HeldOut
from avtrain.pretraining.module import Pretraining, inputs_of
from avtrain.pretraining.noise import hashed
from avtrain.pretraining.objectives import ObjectiveResult
from avtrain.pretraining.optimizer import pretraining_optimizer
from avtrain.run_folder import CONFIG, RunFolder, check_settings, delete, read_settings, write_settings
from avtrain.runtime import Runtime, seed_everything

_INPUTS = "inputs.json"
_START_CLIPS = 8  # that the projections' start values are taken from


def epochs_of(dataset: ClipDataset, config: Config, pin_memory: bool = False) -> Epochs:
    """Every clip once an epoch, in the order that the seed gives."""
    folder, training, data = dataset.folder, config.training, config.data
    cut = cut_of(training.batch_size, training.micro_batch, ranks.rank(), ranks.ranks())
    streams = Streams(cut, clips_of_piece(dataset, [Wanted(ClipPlace(0, 0), 0)]), max(1, data.workers))
    if data.order == "exact":
        check_limit([shard.size for shard in folder.shards if is_remote(shard.url)], data.shards_at_once)

    @lru_cache(maxsize=2)  # the epoch of the batch under way, and of those that workers make ahead
    def order(epoch: int) -> list[ClipPlace]:
        if data.order == "stream":
            return stream_order(folder.clips_of_shards, training.seed, epoch, streams, data.stream_buffer)
        return epoch_order(folder.clips_of_shards, training.seed, epoch, data.shards_at_once)

    def clips_of(epoch: int, first: int, last: int) -> list[Wanted]:
        return [Wanted(place, epoch) for place in order(epoch)[first:last]]

    return Epochs(dataset, clips_of, folder.clips, cut, folder.clips, data.workers, pin_memory)


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
    inputs = {"precision": str(runtime.autocast_dtype or runtime.dtype), "train_shards": train_folder.fingerprint,
              "test_shards": test_folder.fingerprint if test_folder else None}
    if config.data.order == "stream":  # which the order depends on
        inputs["streams"] = f"{ranks.ranks()} x {max(1, config.data.workers)}"
    if force:
        _clear(folder)
    _check_same(folder, config, inputs)
    begun = folder.last_step()
    if begun >= last_step(config.training, max_steps):
        return Pretrained(folder, begun, 0, 0)
    training = config.training
    seed_everything(training.seed)
    network = Pretraining(config).to(runtime.device, runtime.dtype)
    dataset = ClipDataset(train_folder, config.data, training.seed)
    supply = epochs_of(dataset, config, pin_memory=runtime.device.type == "cuda")
    held_out = HeldOut(test_folder, config, runtime) if test_folder and ranks.rank() == 0 else None
    check_room(supply.in_flight_bytes() + (held_out.in_flight_bytes() if held_out else 0))
    modules: dict[str, nn.Module] = {"model": network.model, "objectives": network.objectives}
    run = Run(folder, modules, pretraining_optimizer(modules, training), training,
              lambda to: save_model(to / "model.safetensors", network.model, config))
    network.train()
    if training.cuda_graphs and runtime.device.type == "cuda":
        _capture(network, config, supply.cut.micro_batch, runtime)
    if not run.go_on(supply):
        alone = ClipDataset(train_folder, config.data, training.seed)  # nothing that workers share is opened yet
        first = _readable(alone.__getitems__(supply.wanted(0)[:_START_CLIPS]))
        network.model.standardize(*first.tensors(runtime.device))
        if ranks.rank() == 0:
            write_settings(out / _INPUTS, inputs)
            write_settings(out / CONFIG, config_to(config))
    wrapped = _over_ranks(network, config, runtime)
    pairs = config.objectives.pair > 0 and config.model.fusion != "late"
    draws: list[Draw] = []

    def step(batch: Batch, part: int) -> tuple[Tensor, dict[str, Tensor]]:
        position = run.position
        if part == 0:
            torch.manual_seed(int(hashed(training.seed, position.step, ranks.rank())))  # dropout
            clips = planned(dataset, supply.wanted(position.clips))
            draws[:] = draws_of(clips, supply.cut, config.objectives, training.seed, position.step, pairs)
        last = part == supply.parts - 1
        with nullcontext() if last or wrapped is network else wrapped.no_sync():
            result: ObjectiveResult = wrapped(*inputs_of(batch, supply.cut.micro_batch, runtime.device),
                                              draws[part].to(runtime.device))
        return result.loss, result.figures()

    def evaluate() -> dict[str, float]:
        return held_out.figures(network) if held_out else {}

    run.train(step, supply, runtime.autocast, evaluate, max_steps, max_time_s)
    return Pretrained(folder, run.position.step, run.position.step - begun, run.bad_steps)


def _over_ranks(network: Pretraining, config: Config, runtime: Runtime) -> Any:
    """The network as all processes train it together; gradients are averaged after the last part of a batch."""
    if ranks.ranks() == 1:
        return network
    if config.training.sync_batchnorm:
        network.model.measure_over_ranks()
    devices = [runtime.device] if runtime.device.type == "cuda" else None
    # Another name from torch 2.13 on, with a warning about the old one.
    named = signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"
    options: dict[str, Any] = {buffers: not config.training.sync_batchnorm}
    return DistributedDataParallel(network, devices, **options)


def _capture(network: Pretraining, config: Config, clips: int, runtime: Runtime) -> None:
    """Graphs of parts of so many clips that all have all their segments."""
    data, device = config.data, runtime.device
    shape = (clips, data.segments)
    visual = torch.randint(0, 256, (*shape, 3, data.segment_frames, data.crop, data.crop), dtype=torch.uint8,
                           device=device)
    audio = torch.randn(*shape, 1, data.mels, data.mel_frames, device=device)
    capture(network.model, visual, audio, config.objectives.draws, runtime.autocast_dtype, transformers=True)
    own_gradients(network)


def _readable(batch: Batch) -> Batch:
    """The batch.

    Raises:
        AvtrainError: there is nothing in it.
    """
    if not batch.keys:
        raise AvtrainError(f"not one of the first clips can be decoded; the first: {batch.unreadable[0]}")
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
