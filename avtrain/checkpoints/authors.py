"""The authors' checkpoints in our model: our names from theirs, by a table, strictly.

The Transformers' shared weights stand in their files under four names (`transformer`, `single_visual_transformer`,
`single_audio_transformer`, `multi_transformer`). Loaded the authors' way the last one stays, so that one is taken; the
others must be there too, in the right shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from avtrain.config import ModelConfig
from avtrain.errors import AvtrainError
from avtrain.models.avbert import AVBert
from avtrain.models.heads import ClipHead, SequenceHead

_COPIES = ("transformer", "single_visual_transformer", "single_audio_transformer", "multi_transformer")
_LAYER = "encoder.albert_layer_groups.0.albert_layers.0"
_TRANSFORMERS = 3
# our linear layer: their linear maps
_LINEARS = {
    "attention_in": ("attention.factor_query", "attention.factor_key", "attention.factor_value"),
    "attention_out": ("attention.factor_dense",),
    "feedforward_in": ("factor_ffn",),
    "feedforward_out": ("factor_ffn_output",),
}
_LAYER_NORMS = {"attention_norm": "attention.LayerNorm", "feedforward_norm": "full_layer_layer_norm"}
# our module or parameter: theirs
_MODULES = {
    "visual_projection": "visual_fc", "visual_norm": "visual_norm",
    "audio_projection": "audio_fc", "audio_norm": "audio_norm",
    "visual_embedding.norm": "single_visual_embeddings.LayerNorm",
    "audio_embedding.norm": "single_audio_embeddings.LayerNorm",
    "multimodal_embedding.norm": "multi_embeddings.LayerNorm",
}
_EMBEDDINGS = {
    "bos": "summary_encoding.bos_embeddings",
    "modality": "multi_embeddings.token_type_embeddings",
    "visual_embedding.positions": "single_visual_embeddings.position_embeddings",
    "audio_embedding.positions": "single_audio_embeddings.position_embeddings",
    "multimodal_embedding.positions": "multi_embeddings.position_embeddings",
}
_CLIP_HEAD = {"projection.weight": "concat_head.projection.weight", "projection.bias": "concat_head.projection.bias"}
_SEQUENCE_HEAD = {
    "visual.weight": "concat_seq_head.fc1.weight", "audio.weight": "concat_seq_head.fc2.weight",
    "norm.weight": "concat_seq_head.ln.weight", "norm.bias": "concat_seq_head.ln.bias",
    "projection.weight": "concat_seq_head.projection.weight", "projection.bias": "concat_seq_head.projection.bias",
}
# the modules of a visual bottleneck's branch, of a split audio one's, and of a shortcut, by index
_BRANCH = {0: "branch2.a", 1: "branch2.a_bn", 3: "branch2.b", 4: "branch2.b_bn", 6: "branch2.c", 7: "branch2.c_bn"}
_SPLIT_BRANCH = {0: "branch2.a", 1: "branch2.a_bn", 3: "branch2.b1", 4: "branch2.b1_bn", 6: "branch2.b2",
                 7: "branch2.b2_bn", 9: "branch2.c", 10: "branch2.c_bn"}
_SHORTCUT = {0: "branch1", 1: "branch1_bn"}
_VISUAL_STEM = {0: "s1.pathway0_stem.conv", 1: "s1.pathway0_stem.bn"}
_AUDIO_STEM = {0: "s1.stem.conv1", 1: "s1.stem.bn1", 3: "s1.stem.conv2", 4: "s1.stem.bn2"}
_SPLIT_STAGES = 2


class _Wanted(NamedTuple):
    """Their tensors that make one of ours: stacked or joined along the first dimension, then given its shape."""

    theirs: list[str]
    shape: tuple[int, ...]  # of each of theirs


def load_released(checkpoint: str | Path | Mapping[str, Any]) -> AVBert:
    """Read a checkpoint of the authors' release.

    Args:
        checkpoint: a file, or its contents: the state dict, or a dictionary that holds it as `state_dict`. Either the
            whole network, or a network of one modality (UCF101, ESC-50), which holds a CNN and a task's head: then
            everything but that CNN stays at a random start, the same every time.

    Returns:
        The model (mid fusion, rank 128), in eval mode, float32. Task heads are left out: see `load_released_heads`.

    Raises:
        AvtrainError: not such a file, or tensors that are unknown, missing or misshapen, by name.
        OSError: the file can't be read.
    """
    return load_released_parts(checkpoint)[0]


def load_released_parts(checkpoint: str | Path | Mapping[str, Any]) -> tuple[AVBert, frozenset[str]]:
    """`load_released`, and which of visual (CNN), audio (CNN) and transformers the file holds."""
    source, state = _read(checkpoint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what the file does not hold is the same every time: results can be resumed and cached
        model = AVBert(ModelConfig())
    cnns = [name for name in ("visual_conv", "audio_conv") if any(key.startswith(f"{name}.") for key in state)]
    wanted = dict(_wanted(model, state, cnns))
    identities = [] if cnns else [
        f"avbert.{copy}.{_LAYER}.{linear}.orthogonal_ms{transformer}_linear.base" for copy in _COPIES
        for linears in _LINEARS.values() for linear in linears for transformer in range(_TRANSFORMERS)]
    shapes = {name: entry.shape for entry in wanted.values() for name in entry.theirs}
    for copy in [] if cnns else _COPIES[:-1]:
        shapes.update({name.replace(_COPIES[-1], copy): shape for name, shape in shapes.items()
                       if name.startswith(f"avbert.{_COPIES[-1]}.")})
    rank = model.config.rank or 0
    shapes.update({name: (rank, rank) for name in identities})
    _check_names(source, state, shapes)
    for name in identities:
        if not torch.equal(state[name].float(), torch.eye(rank)):
            raise AvtrainError(f"{source}: {name} is not the identity, so its rotation is not one of this model's")
    ours = model.state_dict()
    for name, entry in wanted.items():
        ours[name] = torch.stack([state[theirs] for theirs in entry.theirs]).reshape(ours[name].shape)
    model.load_state_dict(ours)
    parts = [name.removesuffix("_conv") for name in cnns] or ["visual", "audio", "transformers"]
    return model.eval(), frozenset(parts)


def load_released_heads(checkpoint: str | Path | Mapping[str, Any]) -> tuple[ClipHead, SequenceHead]:
    """The two heads of the authors' Kinetics-Sounds checkpoint, in eval mode, dropout 0.5.

    Args:
        checkpoint: as for `load_released`.

    Raises:
        AvtrainError: not such a file, or a head's tensor is missing or misshapen.
    """
    source, state = _read(checkpoint)
    projection = state.get("concat_head.projection.weight")
    if projection is None or projection.dim() != 2:
        raise AvtrainError(f"{source}: holds no Kinetics-Sounds heads (concat_head, concat_seq_head)")
    classes, features = projection.shape
    clip, sequence = ClipHead(features, classes, dropout=0.5), SequenceHead(ModelConfig().dimension, classes, 0.5)
    shapes = {theirs: tuple(head.state_dict()[ours].shape) for head, table in
              ((clip, _CLIP_HEAD), (sequence, _SEQUENCE_HEAD)) for ours, theirs in table.items()}
    _check_names(source, {name: tensor for name, tensor in state.items() if _is_head(name)}, shapes)
    clip.load_state_dict({ours: state[theirs] for ours, theirs in _CLIP_HEAD.items()})
    sequence.load_state_dict({ours: state[theirs] for ours, theirs in _SEQUENCE_HEAD.items()})
    return clip.eval(), sequence.eval()


def _wanted(model: AVBert, state: Mapping[str, Tensor], cnns: list[str]) -> Iterator[tuple[str, _Wanted]]:
    """Our names, each with the names of theirs that it is made of."""
    ours = model.state_dict()
    prefix = "" if cnns else "avbert."
    for name, tensor in ours.items():
        module, _, rest = name.partition(".")
        if module in ("visual_cnn", "audio_cnn"):
            theirs = "visual_conv" if module == "visual_cnn" else "audio_conv"
            if not cnns or theirs in cnns:
                yield name, _Wanted([f"{prefix}{theirs}.{_cnn_name(rest, module == 'visual_cnn')}"],
                                    tuple(tensor.shape))
        elif cnns:
            continue
        elif module == "encoder":
            yield name, _encoder_tensors(rest.removeprefix("stacks.0.0."), tensor)
        elif name in _EMBEDDINGS:
            yield name, _Wanted([f"{prefix}{_EMBEDDINGS[name]}.weight"], tuple(tensor.shape))
        else:
            parent, _, kind = name.rpartition(".")
            yield name, _Wanted([f"{prefix}{_MODULES[parent]}.{kind}"], tuple(tensor.shape))


def _encoder_tensors(name: str, tensor: Tensor) -> _Wanted:
    """Their tensors for one of the shared layer's, for example "feedforward_in.private"."""
    prefix = f"avbert.{_COPIES[-1]}.{_LAYER}"
    module, _, kind = name.partition(".")
    if module in _LAYER_NORMS:
        return _Wanted([f"{prefix}.{_LAYER_NORMS[module]}.{kind}"], tuple(tensor.shape))
    linears = [f"{prefix}.{linear}" for linear in _LINEARS[module]]
    if kind == "bias":
        return _Wanted([f"{linear}.s_linear.bias" for linear in linears], (len(tensor) // len(linears),))
    if kind == "shared":
        return _Wanted([f"{linear}.s_linear.weight" for linear in linears], tuple(tensor.shape[1:]))
    theirs = {"private": "ms{}_linear.weight", "skew": "orthogonal_ms{}_linear.A"}[kind]
    rows = tensor.shape[1] // len(linears) if kind == "private" else tensor.shape[2]
    return _Wanted([f"{linear}.{theirs.format(transformer)}" for transformer in range(_TRANSFORMERS)
                    for linear in linears], (rows, tensor.shape[-1]))


def _cnn_name(name: str, visual: bool) -> str:
    """Ours, for example "stages.0.2.branch.3.weight", as theirs: "s2.pathway0_res2.branch2.b.weight"."""
    parts = name.split(".")
    if parts[0] == "stem":
        return f"{(_VISUAL_STEM if visual else _AUDIO_STEM)[int(parts[1])]}.{parts[2]}"
    stage, block, part, index, kind = int(parts[1]), parts[2], parts[3], int(parts[4]), parts[5]
    branch = _BRANCH if visual or stage >= _SPLIT_STAGES else _SPLIT_BRANCH
    inside = (_SHORTCUT if part == "shortcut" else branch)[index]
    return f"s{stage + 2}.{'pathway0_' if visual else ''}res{block}.{inside}.{kind}"


def _check_names(source: str, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in shapes if name not in state]
    if missing:
        raise AvtrainError(f"{source}: tensors are missing: {_listed(missing)}")
    misshapen = [f"{name} is {tuple(state[name].shape)}, not {shape}" for name, shape in shapes.items()
                 if tuple(state[name].shape) != shape]
    if misshapen:
        raise AvtrainError(f"{source}: tensors have the wrong shape: {_listed(misshapen)}")
    # names that end in _B are a cache of the authors' code
    unknown = [name for name in state if name not in shapes and not name.endswith("_B") and not _is_head(name)]
    if unknown:
        raise AvtrainError(f"{source}: tensors are unknown: {_listed(unknown)}")


def _is_head(name: str) -> bool:
    return "head" in name.partition(".")[0]


def _listed(names: list[str]) -> str:
    shown = 8
    return ", ".join(names[:shown]) + (f", and {len(names) - shown} more" if len(names) > shown else "")


def _read(checkpoint: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """What to call it in errors, and the tensors by name."""
    source, content = "state dict", checkpoint
    if isinstance(checkpoint, str | Path):
        source = str(checkpoint)
        try:
            content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # unpickling what is no checkpoint ends in any of them
            raise AvtrainError(f"{source}: not a checkpoint that can be read safely; a file by torch.save with nothing "
                               "but tensors, numbers and text is wanted") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise AvtrainError(f"{source}: not a checkpoint of the authors' release: a dictionary of tensors is wanted, or "
                           "one under the key state_dict")
    hollow = [str(name) for name, tensor in content.items() if not _is_whole(tensor)]
    if hollow:
        raise AvtrainError(f"{source}: tensors are not stored in whole: {_listed(hollow)}")
    return source, dict(content)


def _is_whole(tensor: Tensor) -> bool:
    """Whether each of its values is stored: a stranger's file may state a shape that no memory holds."""
    return (tensor.layout is torch.strided and tensor.device.type == "cpu"
            and tensor.nbytes <= tensor.untyped_storage().nbytes())
