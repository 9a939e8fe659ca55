"""How many parameters a network has, by part."""

from __future__ import annotations

from dataclasses import replace

import torch

from avtrain.config import Config
from avtrain.models.avbert import AVBert


def unshared(config: Config) -> Config:
    """The same network without any sharing of weights."""
    return replace(config, model=replace(config.model, share_layers=False, share_transformers=False, rank=None))


def counted(config: Config) -> dict[str, int]:
    """Parameters by part."""
    with torch.device("meta"):  # shapes without memory
        model = AVBert(config.model)
    parts = {"visual_cnn": "visual CNN", "audio_cnn": "audio CNN", "visual_projection": "projections and norms",
             "visual_norm": "projections and norms", "audio_projection": "projections and norms",
             "audio_norm": "projections and norms", "encoder": "Transformers"}
    counts = dict.fromkeys([*parts.values(), "embeddings"], 0)
    for name, parameter in model.named_parameters():
        counts[parts.get(name.partition(".")[0], "embeddings")] += parameter.numel()
    return counts
