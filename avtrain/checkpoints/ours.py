"""Files of weights: safetensors with the settings inside, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from avtrain.config import Config, config_from, config_to
from avtrain.errors import AvtrainError
from avtrain.files import written_whole
from avtrain.models.avbert import AVBert


def parts_of(modality: str, transformers: bool) -> frozenset[str]:
    """Of visual (CNN), audio (CNN) and transformers those that take part."""
    seen = ("visual", "audio") if modality == "both" else (modality,)
    return frozenset((*seen, "transformers") if transformers else seen)


def save_model(path: Path, model: nn.Module, config: Config, parts: frozenset[str] | None = None) -> None:
    """Write a model's weights and its settings.

    Args:
        path: a .safetensors file.
        model: an `AVBert` of `config.model`.
        config: stored as JSON under "config" in the file's metadata.
        parts: which of visual, audio and transformers have been trained, under "parts"; None: all for
            `config.data.modality`.
    """
    parts = parts_of(config.data.modality, True) if parts is None else parts
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with written_whole(path) as temporary:
        save_file(weights, temporary, {"config": json.dumps(config_to(config)), "parts": json.dumps(sorted(parts))})


class Checkpoint(NamedTuple):
    """What a file of ours holds.

    Attributes:
        model: in eval mode, on the CPU.
        config: the settings.
        parts: which of visual, audio and transformers have been trained: the rest is as it was drawn.
    """

    model: AVBert
    config: Config
    parts: frozenset[str]


def _check_shapes(path: Path, config: Config, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise AvtrainError where a file does not hold the tensors of its settings' model."""
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in AVBert(config.model).state_dict().items()}
    wrong = [f"{name} is missing" for name in wanted if name not in shapes]
    wrong += [f"{name} is unknown" for name in shapes if name not in wanted]
    wrong += [f"{name} is {shapes[name]}, not {shape}" for name, shape in wanted.items()
              if name in shapes and shapes[name] != shape]
    if wrong:
        more = f", and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise AvtrainError(f"{path}: {', '.join(wrong[:8])}{more}")


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        AvtrainError: not a checkpoint of avtrain, or one with settings that this version does not know; tensors are
            missing, unknown or misshapen, by name.
        OSError: the file can't be read.
    """
    path.open("rb").close()  # a missing file is an OSError with its name
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            values, parts = json.loads(metadata["config"]), json.loads(metadata.get("parts", "null"))
            if not isinstance(values, dict) or parts is not None and not (
                    isinstance(parts, list) and all(part in ("visual", "audio", "transformers") for part in parts)):
                raise AvtrainError(f"{path}: its settings are damaged")
            config = config_from(values, str(path))
            _check_shapes(path, config, shapes)  # before any memory is taken: they may be a stranger's
            weights = {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise AvtrainError(f"{path}: not a checkpoint of avtrain, or damaged (the authors' end in .pyth)") from error
    model = AVBert(config.model)
    model.load_state_dict(weights)
    return Checkpoint(model.eval(), config, parts_of(config.data.modality, True) if parts is None else frozenset(parts))
