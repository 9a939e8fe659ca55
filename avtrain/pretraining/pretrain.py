"""Pretraining: puts model, objectives, data and engine together (paper, section 3)."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from avtrain import ranks
from avtrain.checkpoints.ours import save_model
from avtrain.config import HOW_DIVIDED, HOW_MADE, WHEN_LOOKED_AT, Config, config_from, config_to
from avtrain.data.cache import check_limit
from avtrain.data.clips import ClipDataset
from avtrain.data.handover import check_room
from avtrain.data.loader import Batch, Epochs, clips_of_piece
from avtrain.data.order import ClipPlace, Cut, Wanted, cut_of, epoch_order
from avtrain.data.shards import open_folders
from avtrain.data.storage import is_remote
from avtrain.data.stream import Streams, stream_order
from avtrain.engine import Run, last_step
from avtrain.errors import AvtrainError
from avtrain.flops import mfu_of_clip_per_s
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
_SHARDS = ("train_shards", "test_shards")
_AT_ONCE = "clips_at_once"  # of all processes: those that BatchNorm, wrong pairs and negatives see
_START_CLIPS = 8  # that the projections' start values are taken from
_LOG = logging.getLogger(__name__)


def _cut(config: Config) -> Cut:
    return cut_of(config.training.batch_size, config.training.micro_batch, ranks.rank(), ranks.ranks())


def epochs_of(dataset: ClipDataset, config: Config, pin_memory: bool = False) -> Epochs:
    """Every clip once an epoch, in the order that the seed gives."""
    folder, training, data = dataset.folder, config.training, config.data
    cut = _cut(config)
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
        made: steps of this call.
        bad_steps: the last ones, in a row, that were not finite; the last checkpoint has the weights from before them.
        was_there: the run was there already, and nothing was done.
    """

    folder: RunFolder
    step: int
    made: int
    bad_steps: int
    was_there: bool = False


def pretrain(config: Config, train: list[str], test: list[str], out: Path, runtime: Runtime, force: bool = False,
             max_steps: int | None = None, until: float | None = None, new_data: bool = False,
             wandb: str | None = None) -> Pretrained:
    """Pretrain a model from scratch, or go on with the run in `out` from its last checkpoint.

    Args:
        config: all settings; a run that is gone on with must have the same ones.
        train, test: folders of shards; without `test` nothing is held out.
        out: folder of the run.
        runtime: device and precision.
        force: begin anew; what an earlier run wrote is deleted.
        max_steps: stop there, with a checkpoint, though the schedule goes on.
        until: stop, with a checkpoint, so that all is done then: of `time.monotonic`.
        new_data: go on with other shards than before; an epoch begins on them.
        wandb: the project on Weights & Biases that gets the metrics too; None: none.

    Raises:
        Stopped: a signal came.
        AvtrainError: data and settings don't fit, or the run in `out` was begun with others.
    """
    train_folder = open_folders(train, labelled=False)
    test_folder = open_folders(test, labelled=False) if test else None
    folder = RunFolder(out)
    inputs = {"precision": str(runtime.autocast_dtype or runtime.dtype), "train_shards": train_folder.fingerprint,
              "test_shards": test_folder.fingerprint if test_folder else None,
              _AT_ONCE: str(_cut(config).at_once)}
    if config.data.order == "stream":  # which the order depends on
        inputs["streams"] = f"{ranks.ranks()} x {max(1, config.data.workers)}"
    if force:
        ranks.by_first(lambda: _clear(folder))
    before = _check_same(folder, config, inputs, new_data)
    begun = folder.last_step()
    if begun >= last_step(config.training, max_steps) and folder.due() is None:
        return Pretrained(folder, begun, 0, 0, was_there=True)
    training = config.training
    seed_everything(training.seed)
    network = Pretraining(config).to(runtime.device, runtime.dtype)
    dataset = ClipDataset(train_folder, config.data, training.seed)
    supply = epochs_of(dataset, config, pin_memory=runtime.device.type == "cuda")
    held_out = HeldOut(test_folder, config, runtime) if test_folder and ranks.rank() == 0 else None
    check_room(supply.in_flight_bytes() + (held_out.in_flight_bytes() if held_out else 0))
    modules: dict[str, nn.Module] = {"model": network.model, "objectives": network.objectives}
    run = Run(folder, modules, pretraining_optimizer(modules, training), training,
              lambda to: save_model(to / "model.safetensors", network.model, config), runtime.scaled,
              mfu_of_clip_per_s(config, runtime.device, runtime.autocast_dtype), wandb)
    network.train()
    if training.cuda_graphs and runtime.device.type == "cuda":
        _capture(network, config, supply.cut.micro_batch, runtime)
    if not run.go_on(supply, train_folder.fingerprint, str(before["train_shards"])):
        alone = ClipDataset(train_folder, config.data, training.seed)  # nothing that workers share is opened yet
        first = _readable(alone.__getitems__(supply.wanted(0)[:_START_CLIPS]))
        network.model.standardize(*first.tensors(runtime.device))
        if ranks.rank() == 0:
            write_settings(out / _INPUTS, inputs)
            write_settings(out / CONFIG, config_to(config))
    if ranks.ranks() > 1 and training.sync_batchnorm:
        network.model.measure_over_ranks()
    wrapped = ranks.averaging(network, runtime.device, training.sync_batchnorm)
    if before != inputs and ranks.rank() == 0:
        run.save(folder.due())  # from now on the position is one in the new data
        write_settings(out / _INPUTS, inputs)
        _LOG.warning("%s: from step %d on with %s", out, run.position.step, _other_inputs(run, supply, before, inputs))
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

    run.train(step, supply, runtime.autocast, (lambda: held_out.figures(network)) if held_out else None, max_steps,
              until)
    return Pretrained(folder, run.position.step, run.position.step - begun, run.bad_steps)


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


def _check_same(folder: RunFolder, config: Config, inputs: dict[str, str | None],
                new_data: bool) -> dict[str, str | None]:
    """Raise where there is something to go on with, and it was begun with other settings, data or precision.

    Before its first whole checkpoint a run has nothing that would be lost: it is begun again, with any settings.

    Returns:
        The inputs that the run has had so far.
    """
    checkpoint = folder.last_checkpoint()
    if checkpoint is None:
        return inputs
    path, of_inputs = folder.path / CONFIG, folder.path / _INPUTS
    if not path.is_file():
        raise AvtrainError(f"{checkpoint} is of no run of `avtrain pretrain`, for {path} is not there: choose another "
                           "folder with --out")
    before, now = config_to(config_from(read_settings(path), str(path))), config_to(config)
    for section, names in (("data", HOW_MADE), ("training", WHEN_LOOKED_AT + HOW_DIVIDED)):
        before[section] |= {name: now[section][name] for name in names}
    # Runs of earlier versions have not written down their inputs.
    had: dict[str, str | None] = inputs | (read_settings(of_inputs) if of_inputs.is_file() else {})
    shards_change = any(had[name] != inputs[name] for name in _SHARDS)
    may_change = {_AT_ONCE: inputs[_AT_ONCE]} | ({name: inputs[name] for name in _SHARDS} if new_data else {})
    check_settings(folder.path, before | had | may_change, now | inputs,
                   "--new-data to go on with these shards, --force" if shards_change else "--force")
    return had


def _other_inputs(run: Run, supply: Epochs, before: dict[str, str | None], inputs: dict[str, str | None]) -> str:
    """What differs from what the run has had so far."""
    found = []
    if before["train_shards"] != inputs["train_shards"]:
        found.append(f"other shards, and epoch {run.position.clips // len(supply)} begins on them")
    elif before["test_shards"] != inputs["test_shards"]:
        found.append("other held-out shards")
    if before[_AT_ONCE] != inputs[_AT_ONCE]:
        found.append(f"{inputs[_AT_ONCE]} clips at once instead of {before[_AT_ONCE]}: BatchNorm, wrong pairs and "
                     "negatives see these")
    return "; ".join(found)


def _clear(folder: RunFolder) -> None:
    """Delete what a run wrote; its settings last, by which it is known to be one."""
    if (folder.path / CONFIG).is_file():
        folder.clear()
        delete(folder.path / name for name in ("report.html", "report.png", _INPUTS, CONFIG))
