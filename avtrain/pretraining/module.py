"""One module from batch to losses: what is wrapped for several processes, compiled, or captured as a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from avtrain.config import Config
from avtrain.data.loader import Batch
from avtrain.models.avbert import AVBert
from avtrain.pretraining.draw import Draw
from avtrain.pretraining.objectives import ObjectiveResult, Objectives


class Pretraining(nn.Module):
    """The model and the objectives that wrap it.

    Args:
        config: sizes of the model, weights of the objectives.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = AVBert(config.model)
        self.objectives = Objectives(config.model, config.objectives)

    def forward(self, visual: Tensor, audio: Tensor, visual_present: Tensor, audio_present: Tensor,
                here: tuple[Tensor | None, Tensor | None], read: Tensor, draw: Draw) -> ObjectiveResult:
        """The share of the loss and of the figures as tensors on the device, none of which has been waited for.

        Args:
            visual: (seen, 3, frames, height, width), the segments that are there, clip by clip.
            audio: (heard, 1, mels, frames), the same.
            visual_present, audio_present: (clips, segments) boolean, which these are.
            here: their positions, clip * segments + segment; None: all.
            read: (clips,) boolean, the clips that could be read.
            draw: what was drawn for these clips. All of it on the device.
        """
        embedded = self.model.embed_segments(visual, audio, visual_present, audio_present, here)
        result: ObjectiveResult = self.objectives(self.model, embedded, draw, read)
        return result


def inputs_of(batch: Batch, clips: int, device: torch.device) -> tuple[Any, ...]:
    """A part of a batch as `Pretraining.forward` takes it, all but the draw: a row for each clip, read or not."""
    places = torch.tensor(batch.places, dtype=torch.int64)
    presence = [torch.zeros(clips, present.shape[1], dtype=torch.bool).index_copy(0, places, present)
                for present in (batch.visual_present, batch.audio_present)]
    read = torch.zeros(clips, dtype=torch.bool).index_fill(0, places, True)
    here = [present.flatten().nonzero().squeeze(1) for present in presence]
    visual, audio = batch.segments(device)
    *on_device, seen, heard = (tensor.to(device, non_blocking=True) for tensor in (*presence, read, *here))
    return visual, audio, on_device[0], on_device[1], (seen, heard), on_device[2]
