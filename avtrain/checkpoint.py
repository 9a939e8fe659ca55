"""Files of weights: safetensors with the settings inside, and exported programs. All are written atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

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
            weights = {name: file.get_tensor(name) for name in file.keys()}
        values, parts = json.loads(metadata["config"]), json.loads(metadata.get("parts", "null"))
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise AvtrainError(f"{path}: not a checkpoint of avtrain, or damaged (the authors' end in .pyth)") from error
    if not isinstance(values, dict):
        raise AvtrainError(f"{path}: its settings are damaged")
    config = config_from(values, str(path))
    model = AVBert(config.model)
    wanted = model.state_dict()
    wrong = [f"{name} is missing" for name in wanted if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in wanted]
    wrong += [f"{name} is {tuple(weights[name].shape)}, not {tuple(tensor.shape)}" for name, tensor in wanted.items()
              if name in weights and weights[name].shape != tensor.shape]
    if wrong:
        more = f", and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise AvtrainError(f"{path}: {', '.join(wrong[:8])}{more}")
    model.load_state_dict(weights)
    return Checkpoint(model.eval(), config, parts_of(config.data.modality, True) if parts is None else frozenset(parts))


class _Exported(nn.Module):
    """The model as a function of two tensors: named outputs, without the ones that its fusion does not have."""

    def __init__(self, model: AVBert) -> None:
        super().__init__()
        self.model = model

    def forward(self, visual: Tensor, audio: Tensor) -> dict[str, Tensor]:
        """Shapes as in `AVBert.forward`, all segments present."""
        output = self.model(visual, audio)._asdict()
        return {name: tensor for name, tensor in output.items() if tensor is not None}


def export_model(checkpoint: Path, output: Path) -> float:
    """Write a checkpoint's model as a program that torch.export.load runs without this package.

    The program takes `visual` and `audio` of any number of clips, of the clip shape in the checkpoint's settings, all
    segments present, and returns a dictionary with the fields of `AVBertOutput`. It is read back and compared.

    Args:
        checkpoint: an avtrain checkpoint.
        output: a .pt2 file.

    Returns:
        The largest absolute difference to the model itself, over all outputs.

    Raises:
        AvtrainError: not a checkpoint, or the program's outputs are more than 1e-4 off (then nothing is written).
        OSError: a file can't be read or written.
    """
    if output.suffix != ".pt2":
        raise AvtrainError(f"{output}: an exported program's name ends in .pt2")
    loaded = load_checkpoint(checkpoint)
    data, model = loaded.config.data, _Exported(loaded.model).eval()
    for parameter in model.parameters():  # torch.export.save warns of channels-last weights
        parameter.data = parameter.data.contiguous()
    generator = torch.Generator().manual_seed(0)
    visual = torch.randn(2, data.segments, 3, data.segment_frames, data.crop, data.crop, generator=generator)
    audio = torch.randn(2, data.segments, 1, data.mels, data.mel_frames, generator=generator)
    batch = torch.export.Dim("batch")
    with torch.no_grad(), written_whole(output) as temporary:
        program = torch.export.export(model, (visual, audio), dynamic_shapes=({0: batch}, {0: batch}))
        torch.export.save(program, temporary)
        reread = torch.export.load(temporary).module()
        ours, theirs = model(visual[:1], audio[:1]), reread(visual[:1], audio[:1])
        difference = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
        if not difference <= 1e-4:
            raise AvtrainError(f"{checkpoint}: the exported program's outputs are {difference:.1e} off; not written")
    return difference
