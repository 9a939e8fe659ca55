"""One module from batch to losses: what is wrapped for several processes, compiled, or captured as a graph."""

from __future__ import annotations

from torch import Tensor, nn

from avtrain.config import Config
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
                draw: Draw) -> ObjectiveResult:
        """Loss and figures as tensors on the device, none of which has been waited for.

        Args:
            visual, audio, visual_present, audio_present: as in `AVBert.forward`.
            draw: what was drawn for these clips, on the same device.
        """
        embedded, *_ = self.model.embed(visual, audio, visual_present, audio_present, draw.here)
        result: ObjectiveResult = self.objectives(self.model, embedded, draw)
        return result
