"""What a model makes of shards with its weights frozen, computed once and kept on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from avtrain.config import HOW_MADE, ClipConfig, DataConfig
from avtrain.data.clips import ClipDataset
from avtrain.data.loader import Batch, batches, readable
from avtrain.data.order import at_epoch, batches_of, fixed_order
from avtrain.data.shards import ShardFolder
from avtrain.data.views import Views
from avtrain.errors import AvtrainError
from avtrain.files import written_whole
from avtrain.models.avbert import AVBert
from avtrain.progress import bar_options
from avtrain.runtime import Runtime

_CLIPS_AT_ONCE = 8
_SEGMENTS_AT_ONCE = 160


@dataclass(frozen=True)
class Features:
    """Frozen outputs of a model, float32 on the CPU. A row is a clip, in the order of the shards.

    Attributes:
        keys: of each row's clip.
        labels: indices of each row's classes.
        visual_present, audio_present: (rows, segments) boolean.
        visual_pooled, audio_pooled: (rows, segments, channels), the CNNs' outputs; zeros where absent.
        visual_local, audio_local: (rows, segments, D), projected and normalised.
        visual_tokens, audio_tokens: (rows, 1 + segments, D), BOS first; None with early fusion.
        multimodal_tokens: (rows, 2 + 2 * segments, D), visual first; None with late fusion.
    """

    keys: list[str]
    labels: list[list[int]]
    visual_present: Tensor
    audio_present: Tensor
    visual_pooled: Tensor
    audio_pooled: Tensor
    visual_local: Tensor
    audio_local: Tensor
    visual_tokens: Tensor | None = None
    audio_tokens: Tensor | None = None
    multimodal_tokens: Tensor | None = None


@dataclass(frozen=True)
class ViewFeatures:
    """What the CNNs make of views, float32 on the CPU. A row is a view, in the order of the shards.

    Attributes:
        keys: of each row's clip.
        labels: indices of each row's classes.
        pooled: (rows, channels), visual before audio, each the mean over the segments that are there.
    """

    keys: list[str]
    labels: list[list[int]]
    pooled: Tensor


_Kind = TypeVar("_Kind", Features, ViewFeatures)


def frozen_features(model: AVBert, folder: ShardFolder, config: DataConfig, runtime: Runtime,
                    cache: Path | None = None) -> Features:
    """Features of whole clips in the fixed view of evaluation, from the cache where they were computed before.

    Args:
        model: used in eval mode on the runtime's device; its mode is put back.
        folder: the shards; clips that can't be decoded are left out.
        config: what a clip looks like.
        runtime: device and precision.
        cache: folder of cached features, named by network, shards, view and precision; None: nothing is kept.

    Raises:
        AvtrainError: shards and settings don't fit, more than 1 % of the clips can't be decoded, or features are not
            finite.
    """
    view = {field.name: getattr(config, field.name) for field in dataclasses.fields(ClipConfig)
            if field.name not in HOW_MADE}

    def outputs(batch: Batch) -> dict[str, Tensor | None]:
        found = model(*batch.tensors(runtime.device))
        return {"visual_present": batch.visual_present, "audio_present": batch.audio_present, **found._asdict()}

    def compute() -> Features:
        places = batches_of(fixed_order(folder.clips_of_shards), _CLIPS_AT_ONCE)
        supply = batches(ClipDataset(folder, config, None), at_epoch(places, 0), config.workers)
        return Features(**_extract(model, outputs, supply, len(places), runtime, folder.clips))

    return _cached(Features, compute, cache, _key(model, folder, runtime, view))


def view_features(model: AVBert, folder: ShardFolder, config: DataConfig, views: Views, runtime: Runtime,
                  cache: Path | None = None) -> ViewFeatures:
    """The CNNs' features of all clips in evenly spaced views.

    Args:
        model, folder, config, runtime, cache: as for `frozen_features`.
        views: which.

    Returns:
        Features; a modality that is left out has no channels.

    Raises:
        AvtrainError: as `frozen_features`.
    """
    def outputs(batch: Batch) -> dict[str, Tensor | None]:
        local, visual_present, audio_present = model.embed(*batch.tensors(runtime.device))
        seen, heard = _means(local.visual_pooled, visual_present), _means(local.audio_pooled, audio_present)
        return {"pooled": torch.cat({"visual": [seen], "audio": [heard]}.get(views.modality, [seen, heard]), 1)}

    def compute() -> ViewFeatures:
        places = batches_of(fixed_order(folder.clips_of_shards),
                            max(1, _SEGMENTS_AT_ONCE // (views.clips * views.crops)))
        supply = batches(ClipDataset(folder, config, None, views), at_epoch(places, 0), config.workers)
        return ViewFeatures(**_extract(model, outputs, supply, len(places), runtime, folder.clips))

    view = [config.segment_frames, config.crop, config.scale[0], dataclasses.asdict(views)]
    return _cached(ViewFeatures, compute, cache, _key(model, folder, runtime, view))


def _means(pooled: Tensor, present: Tensor) -> Tensor:
    """(rows, segments, channels) -> (rows, channels): the mean over the segments that are there, or zeros."""
    return (pooled.float() * present[..., None]).sum(1) / present.sum(1, keepdim=True).clamp(min=1)


@torch.no_grad()
def _extract(model: AVBert, outputs: Callable[[Batch], dict[str, Tensor | None]], supply: Iterable[Batch], count: int,
             runtime: Runtime, clips: int) -> dict[str, Any]:
    """Keys, labels and outputs of `count` batches, in their order, in eval mode."""
    was_training = model.training
    model.to(runtime.device).eval()
    keys: list[str] = []
    labels: list[list[int]] = []
    parts: dict[str, list[Tensor]] = {}
    for batch in readable(tqdm(supply, "features", count, unit="batch", **bar_options()), clips):
        with runtime.autocast():
            found = outputs(batch)
        keys += batch.keys
        labels += batch.labels
        for name, tensor in found.items():
            if tensor is not None:
                _check_finite(name, tensor, batch.keys)
                parts.setdefault(name, []).append(tensor.cpu() if tensor.dtype == torch.bool else tensor.float().cpu())
    model.train(was_training)
    return {"keys": keys, "labels": labels, **{name: torch.cat(tensors) for name, tensors in parts.items()}}


def _check_finite(name: str, tensor: Tensor, keys: list[str]) -> None:
    bad = (~tensor.isfinite()).flatten(1).any(1)
    if bool(bad.any()):
        raise AvtrainError(f"{keys[int(bad.nonzero()[0])]}: {name} of it is not finite: use another checkpoint, or "
                           "--precision float32")


def _cached(kind: type[_Kind], compute: Callable[[], _Kind], cache: Path | None, key: list[Any]) -> _Kind:
    """What `compute` gives, or gave before for the same key.

    Args:
        kind: of features.
        compute: called if it is not in the cache.
        cache: folder; None: always computed.
        key: everything that the features depend on, as JSON has it.
    """
    if cache is None:
        return compute()
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = cache / f"{name}.safetensors"
    if path.is_file():
        try:
            return _read(kind, path)
        except (SafetensorError, KeyError, ValueError, TypeError):
            path.unlink()  # damaged: it can be made again
    elif path.exists():
        raise AvtrainError(f"{path} is no file, where features are kept: move it away, or choose another --cache")
    features = compute()
    tensors = {field.name: tensor.contiguous() for field in dataclasses.fields(kind)
               if isinstance(tensor := getattr(features, field.name), Tensor)}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, {"clips": json.dumps([features.keys, features.labels])})
    return features


def _read(kind: type[_Kind], path: Path) -> _Kind:
    with safe_open(path, framework="pt") as file:
        keys, labels = json.loads((file.metadata() or {})["clips"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if {len(keys), len(labels)} != {len(tensor) for tensor in tensors.values()} or any(
            tensor.dtype not in (torch.float32, torch.bool) or not bool(tensor.isfinite().all())
            for tensor in tensors.values()):
        raise ValueError(f"{path}: rows and tensors do not fit, or are not finite")
    return kind(keys, labels, **tensors)


def _key(model: AVBert, folder: ShardFolder, runtime: Runtime, view: Any) -> list[Any]:
    """What features depend on. Some settings, as the scale of log-mels and the stem's stride, show in no weight."""
    return [weights_hash(model), dataclasses.asdict(model.config), folder.fingerprint, str(runtime.autocast_dtype),
            view]


def weights_hash(model: nn.Module) -> str:
    """A hash over the names, shapes and values of all weights and averages."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
