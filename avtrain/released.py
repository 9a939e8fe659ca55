"""The authors' checkpoints in our model: their names to ours, by a table, strictly.

The Transformers' shared weights stand in their files under four names (`transformer`, `single_visual_transformer`,
`single_audio_transformer`, `multi_transformer`); loading them the authors' way, the last one stays, so it is read here.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
# our name: their name
_PLAIN = {
    **{f"{modality}_{ours}.{kind}": f"{modality}_{theirs}.{kind}" for modality in ("visual", "audio")
       for ours, theirs in (("projection", "fc"), ("norm", "norm")) for kind in ("weight", "bias")},
    "bos": "summary_encoding.bos_embeddings.weight",
    "modality": "multi_embeddings.token_type_embeddings.weight",
    **{f"{ours}_embedding.{to}": f"{theirs}_embeddings.{of}"
       for ours, theirs in (("visual", "single_visual"), ("audio", "single_audio"), ("multimodal", "multi"))
       for to, of in (("positions", "position_embeddings.weight"), ("norm.weight", "LayerNorm.weight"),
                      ("norm.bias", "LayerNorm.bias"))},
}
_NORMS = {"attention_norm": "attention.LayerNorm", "feedforward_norm": "full_layer_layer_norm"}
