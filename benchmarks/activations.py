"""`python -m benchmarks.activations [PRESET ...]`: what a step keeps on a GPU, by how many stages run again.

Counted without a GPU: bytes of what autograd saves in bfloat16, each storage once. Maps that run again come back for
the backward pass of one stage at a time, when those of later stages are gone. What an H100 took for `paper`
lies within 5 % of it (docs/performance.md).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks

from avtrain.config import Config, read_config
from avtrain.models.avbert import AVBert
from avtrain.pretraining.objectives import Objectives

_PER_PARAMETER = 5 * 4  # weight, gradient, AdamW's two moments and AMSGrad's maximum, in float32


class Step(NamedTuple):
    """What is held at the worst moment of a step.

    Attributes:
        segment: bytes that both CNNs keep of a segment, and those of its pixels and log-mels.
        clip: bytes that the Transformers keep of a clip, over all draws.
        fixed: bytes of weights, gradients, optimiser.
    """

    segment: float
    clip: float
    fixed: float

    def gib(self, clips: int, segments: int) -> float:
        """Of a micro-batch of so many clips."""
        return (self.fixed + clips * (segments * self.segment + self.clip)) / 2**30


def counted(config: Config) -> list[Step]:
    """For 0, 1, ... stages that run again, up to all of them."""
    data, stages = config.data, max(len(config.model.visual_blocks), len(config.model.audio_blocks))
    pixels, sound = (3, data.segment_frames, data.crop, data.crop), (1, data.mels, data.mel_frames)
    given = pixels[0] * pixels[1] * pixels[2] * pixels[3] + 4 * sound[1] * sound[2]  # uint8 and float32
    after_forward = []
    for count in range(stages + 1):
        with torch.device("meta"):  # shapes alone
            model = AVBert(replace(config.model, stages_recomputed=count)).train().bfloat16()

        def pooled(segments: int, model: AVBert = model) -> list[Tensor]:
            return [cnn(torch.empty(segments, *shape, dtype=torch.bfloat16, device="meta"))
                    for cnn, shape in ((model.visual_cnn, pixels), (model.audio_cnn, sound))]

        after_forward.append(_of_each(pooled, model))
    model, objectives = AVBert(config.model), Objectives(config.model, config.objectives)

    def contextualized(clips: int) -> object:
        local, present = torch.zeros(clips, data.segments, config.model.dimension), torch.ones(clips, data.segments)
        with torch.autocast("cpu", torch.bfloat16):
            return model.contextualize(local, local, present.bool(), present.bool())

    clip = config.objectives.draws * _of_each(contextualized, model)
    fixed = _PER_PARAMETER * sum(parameter.numel() for module in (model, objectives)
                                 for parameter in module.parameters())
    of_stages = [more - less for more, less in zip(after_forward, after_forward[1:], strict=False)]
    return [Step(given + max([held, *(after_forward[-1] + stage for stage in of_stages[:count])]), clip, fixed)
            for count, held in enumerate(after_forward)]


def _of_each(forward: Callable[[int], object], module: nn.Module) -> int:
    """Bytes that the forward pass of two of something keeps, less those of one: without what is there once."""
    one, two = (_saved(lambda count=count: forward(count), module) for count in (1, 2))
    return two - one


def _saved(forward: Callable[[], object], module: nn.Module) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside the parameters."""
    parameters = [parameter.untyped_storage() for parameter in module.parameters()]
    storages: list[UntypedStorage] = []
    seen = {id(storage) for storage in parameters}  # of objects that are held, so that no number is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in seen:
            seen.add(id(storage))
            storages.append(storage)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in storages)


def main(presets: list[str]) -> None:
    """Print a table."""
    print("| preset | stages run again | MB a segment | MB a clip beside | GiB of clips "
          "at once: 4 | 8 | 16 | 32 | 64 |")
    print("|" + "---|" * 9)
    for preset in presets:
        config = read_config(preset)
        for count, step in enumerate(counted(config)):
            sizes = " | ".join(f"{step.gib(clips, config.data.segments):.1f}" for clips in (4, 8, 16, 32, 64))
            print(f"| {preset} | {count} | {step.segment / 1e6:.1f} | {step.clip / 1e6:.1f} | {sizes} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["paper", "small"])
