"""A checkpoint as a program that runs without this package."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from avtrain.checkpoints.ours import load_checkpoint
from avtrain.errors import AvtrainError
from avtrain.files import written_whole
from avtrain.models.avbert import AVBert


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
