"""What a model makes of shards with its weights frozen: handed on as it comes, or kept in files and read in parts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from avtrain.config import HOW_MADE, ClipConfig, DataConfig
from avtrain.data.clips import ClipDataset
from avtrain.data.loader import Batch, UnreadableCount, batches
from avtrain.data.order import at_epoch, batches_of, fixed_order
from avtrain.data.shards import ShardFolder
from avtrain.data.views import Views
from avtrain.errors import AvtrainError, Unreadable
from avtrain.models.avbert import AVBert
from avtrain.progress import bar_options
from avtrain.runtime import Runtime
from avtrain.transfer.feature_file import FeatureFile, Found, Numbers, feature_file
from avtrain.turns import Turns, own

_CLIPS_AT_ONCE = 8
_SEGMENTS_AT_ONCE = 160


class Outputs(NamedTuple):
    """What a model makes of some clips or views, in the order of the shards.

    Attributes:
        batch: keys, labels and presence of the rows; what is seen and heard is no longer there.
        clips: (rows,) the number of each row's clip in the folder.
        tensors: by name, (rows, ...), float32 on the CPU.
    """

    batch: Batch
    clips: Numbers
    tensors: dict[str, Tensor]


def segment_outputs(model: AVBert, folder: ShardFolder, config: DataConfig, runtime: Runtime) -> Turns[Outputs]:
    """Outputs for whole clips in the fixed view of evaluation, some clips at a time; clips that can't be decoded are
    left out. Several processes share the clips.

    Args:
        model: used in eval mode on the runtime's device; its mode is put back.
        folder: the shards.
        config: what a clip looks like.
        runtime: device and precision.

    Returns:
        By name: visual_local and audio_local, (clips, segments, D), zeros where absent; multimodal, of the same shape,
        the mean of a segment's visual and audio tokens, of those that are there; not with late fusion.

    Raises:
        AvtrainError: shards and settings don't fit, more than 1 % of the clips can't be decoded, or outputs are not
            finite.
    """
    def outputs(batch: Batch) -> dict[str, Tensor]:
        found = model(*batch.tensors(runtime.device))
        local = {"visual_local": found.visual_local, "audio_local": found.audio_local}
        if found.multimodal_tokens is None:
            return local
        visual, audio = (tokens[:, 1:].float().cpu() for tokens in found.multimodal_tokens.chunk(2, 1))
        there = [present[..., None].float() for present in (batch.visual_present, batch.audio_present)]
        mean = (visual * there[0] + audio * there[1]) / (there[0] + there[1]).clamp(min=1)
        return {**local, "multimodal": mean}

    return _extract(model, outputs, ClipDataset(folder, config, None), _CLIPS_AT_ONCE, runtime)


def clip_means(model: AVBert, folder: ShardFolder, config: DataConfig, runtime: Runtime, cache: Path) -> FeatureFile:
    """Local embeddings averaged over a clip's segments, of the clips with picture and sound: visual and audio, D each.

    Args:
        model, folder, config, runtime: as for `segment_outputs`.
        cache: folder of features, named by network, shards, view and precision. What was computed before is not
            computed again.

    Raises:
        AvtrainError: as `segment_outputs`.
    """
    def outputs(batch: Batch) -> dict[str, Tensor]:
        local, visual_present, audio_present = model.embed(*batch.tensors(runtime.device))
        return {"visual": _means(local.visual_local.float().cpu(), batch.visual_present),
                "audio": _means(local.audio_local.float().cpu(), batch.audio_present)}

    def of_both(found: Outputs) -> Found:
        both = found.batch.visual_present.any(1) & found.batch.audio_present.any(1)
        return found.clips[both.numpy()], {name: tensor[both] for name, tensor in found.tensors.items()}

    def make() -> Turns[Found]:
        return _extract(model, outputs, ClipDataset(folder, config, None), _CLIPS_AT_ONCE, runtime).mapped(of_both)

    view = {field.name: getattr(config, field.name) for field in dataclasses.fields(ClipConfig)
            if field.name not in HOW_MADE}
    channels = dict.fromkeys(("visual", "audio"), model.config.dimension)
    return feature_file(cache / _name(model, folder, runtime, ["clip means", view]), channels, folder.clips, make)


def view_features(model: AVBert, folder: ShardFolder, config: DataConfig, views: Views, runtime: Runtime,
                  cache: Path) -> FeatureFile:
    """The CNNs' features of all clips in evenly spaced views, a row a view: "pooled", visual before audio, each the
    mean over the segments that are there. A modality that is left out has no channels.

    Args:
        model, folder, config, runtime, cache: as for `clip_means`.
        views: which.

    Raises:
        AvtrainError: as `segment_outputs`.
    """
    def outputs(batch: Batch) -> dict[str, Tensor]:
        local, visual_present, audio_present = model.embed(*batch.tensors(runtime.device))
        seen, heard = _means(local.visual_pooled, visual_present), _means(local.audio_pooled, audio_present)
        return {"pooled": torch.cat({"visual": [seen], "audio": [heard]}.get(views.modality, [seen, heard]), 1)}

    def make() -> Turns[Found]:
        clips_at_once = max(1, _SEGMENTS_AT_ONCE // (views.clips * views.crops))
        made = _extract(model, outputs, ClipDataset(folder, config, None, views), clips_at_once, runtime)
        return made.mapped(lambda found: (found.clips, found.tensors))

    lengths = {"visual": model.visual_cnn.outputs, "audio": model.audio_cnn.outputs}
    channels = {"pooled": lengths.get(views.modality, sum(lengths.values()))}
    view = [config.segment_frames, config.crop, config.scale[0], dataclasses.asdict(views)]
    return feature_file(cache / _name(model, folder, runtime, view), channels, folder.clips, make)


def _means(pooled: Tensor, present: Tensor) -> Tensor:
    """(rows, segments, channels) -> (rows, channels): the mean over the segments that are there, or zeros."""
    return (pooled.float() * present[..., None]).sum(1) / present.sum(1, keepdim=True).clamp(min=1)


def _extract(model: AVBert, outputs: Callable[[Batch], dict[str, Tensor]], dataset: ClipDataset, clips_at_once: int,
             runtime: Runtime) -> Turns[Outputs]:
    """Outputs of all clips of the dataset's folder, in their order, in eval mode."""
    places = batches_of(fixed_order(dataset.folder.clips_of_shards), clips_at_once)
    clips = dataset.folder.clips

    @torch.no_grad()
    def made() -> Iterator[tuple[list[Unreadable], Outputs | None]]:
        was_training = model.training
        model.to(runtime.device, runtime.dtype).eval()
        mine = list(own(range(len(places))))
        supply = batches(dataset, at_epoch([places[number] for number in mine], 0), dataset.config.workers)
        bar = tqdm(supply, "features", len(mine), unit="batch", **bar_options())
        for number, batch in zip(mine, bar, strict=True):
            yield batch.unreadable, outputs_of(number, batch) if batch.keys else None
        model.train(was_training)

    def outputs_of(number: int, batch: Batch) -> Outputs:
        with runtime.autocast():
            found = outputs(batch)
        for name, tensor in found.items():
            _check_finite(name, tensor, batch.keys)
        nothing = torch.empty(0)
        return Outputs(dataclasses.replace(batch, visual=nothing, audio=nothing),
                       number * clips_at_once + np.asarray(batch.places, np.int64),
                       {name: tensor.float().cpu() for name, tensor in found.items()})

    def readable(items: Iterator[tuple[list[Unreadable], Outputs | None]]) -> Iterator[Outputs]:
        count = UnreadableCount(clips)
        for unreadable, found in items:
            count.add(unreadable)
            if found is not None:
                yield found

    return Turns(made(), len(places), readable)


def _check_finite(name: str, tensor: Tensor, keys: list[str]) -> None:
    bad = (~tensor.isfinite()).flatten(1).any(1)
    if bool(bad.any()):
        raise AvtrainError(f"{keys[int(bad.nonzero()[0])]}: {name} of it is not finite: use another checkpoint, or "
                           "--precision float32")


def _name(model: AVBert, folder: ShardFolder, runtime: Runtime, view: Any) -> str:
    """Of a file, by all that its features depend on. Some settings, as the scale of log-mels, show in no weight."""
    key = [weights_hash(model), dataclasses.asdict(model.config), folder.fingerprint, str(runtime.autocast_dtype), view]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24] + ".npy"


def weights_hash(model: nn.Module) -> str:
    """A hash over the names, shapes and values of all weights and averages."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
