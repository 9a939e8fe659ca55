"""The encoder as its formulas are written: a loop over layers, each rotation computed where it is used.

It takes the weights of an `Encoder` with everything shared and low rank, so that outputs and gradients can be compared.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from avtrain.models.lowrank import LowRankLinear
from avtrain.models.transformer import Encoder, TransformerLayer


def plain_transformer(encoder: Encoder, x: Tensor, transformer: int) -> Tensor:
    """(batch, length, D) -> (batch, length, D), no token absent, no dropout."""
    layer = encoder.stacks[0][0]
    assert isinstance(layer, TransformerLayer)
    for _ in range(encoder.layers):
        attended = _linear(layer.attention_out, _attention(layer, x, transformer), transformer)
        x = layer.attention_norm(x + attended)
        widened = torch.nn.functional.gelu(_linear(layer.feedforward_in, x, transformer))
        x = layer.feedforward_norm(x + _linear(layer.feedforward_out, widened, transformer))
    return x


def _attention(layer: TransformerLayer, x: Tensor, transformer: int) -> Tensor:
    query, key, value = (
        _linear(layer.attention_in, x, transformer, index).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for index in range(3))
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def _linear(linear: torch.nn.Module, x: Tensor, transformer: int, index: int = 0) -> Tensor:
    """y = U ( normalize(V x) R ) + b, one of the `linear`'s maps."""
    assert isinstance(linear, LowRankLinear)
    maps, outputs, rank = linear.shared.shape
    upper = linear.skew[transformer, index].triu(1)
    rotation = torch.linalg.matrix_exp(upper - upper.T)
    hidden = x @ linear.private[transformer, index * rank:(index + 1) * rank].T
    hidden = hidden / hidden.norm(dim=-1, keepdim=True)
    return hidden @ rotation @ linear.shared[index].T + linear.bias[index * outputs:(index + 1) * outputs]
