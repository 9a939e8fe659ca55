"""The encoder: post-LayerNorm BERT layers, their weights shared across layers and across Transformers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avtrain.config import ModelConfig
from avtrain.models.lowrank import FoldedLinear, LowRankLinear, SharedLinear, rotation_of

LAYER_NORM_EPS = 1e-12


class FoldedLayer(NamedTuple):
    """One layer's linear maps as one Transformer uses them."""

    attention_in: FoldedLinear  # three maps: query, key, value
    attention_out: FoldedLinear
    feedforward_in: FoldedLinear
    feedforward_out: FoldedLinear


class TransformerLayer(nn.Module):
    """One layer of one or of several Transformers.

    Args:
        config: sizes.
        transformers: how many Transformers use this layer, each with rotations of its own if `config.rank` is set.
    """

    def __init__(self, config: ModelConfig, transformers: int) -> None:
        super().__init__()
        self.heads, self.dropout, self.transformers = config.heads, config.dropout, transformers

        def linear(inputs: int, outputs: int, maps: int = 1) -> SharedLinear | LowRankLinear:
            if config.rank is None:
                return SharedLinear(inputs, outputs, maps)
            return LowRankLinear(inputs, outputs, config.rank, transformers, maps)

        self.attention_in = linear(config.dimension, config.dimension, maps=3)
        self.attention_out = linear(config.dimension, config.dimension)
        self.attention_norm = nn.LayerNorm(config.dimension, eps=LAYER_NORM_EPS)
        self.feedforward_in = linear(config.dimension, config.feedforward)
        self.feedforward_out = linear(config.feedforward, config.dimension)
        self.feedforward_norm = nn.LayerNorm(config.dimension, eps=LAYER_NORM_EPS)
        copy_values_(self.attention_in, self.attention_out, 2 / math.sqrt(config.layers))

    def linears(self) -> list[SharedLinear | LowRankLinear]:
        """In the order of `FoldedLayer`."""
        return [self.attention_in, self.attention_out, self.feedforward_in, self.feedforward_out]

    def forward(self, x: Tensor, attend: Tensor, folded: FoldedLayer) -> Tensor:
        """(batch, length, D), attend (batch, 1, 1, length) boolean -> (batch, length, D)."""
        dropout = self.dropout if self.training else 0.0
        by_head = folded.attention_in.apply(x).view(3, *x.shape[:2], self.heads, -1)
        query, key, value = by_head.transpose(2, 3).unbind()
        mixed = attention(query, key, value, attend, dropout)  # (batch, heads, length, D / heads)
        attended = folded.attention_out.apply(mixed.transpose(1, 2).flatten(2)).squeeze(0)
        x = self.attention_norm(x + F.dropout(attended, dropout))
        widened = F.gelu(folded.feedforward_in.apply(x).squeeze(0))  # (batch, length, feedforward)
        narrowed = folded.feedforward_out.apply(widened).squeeze(0)
        y: Tensor = self.feedforward_norm(x + F.dropout(narrowed, dropout))
        return y


def attention(query: Tensor, key: Tensor, value: Tensor, attend: Tensor, dropout: float) -> Tensor:
    """torch's scaled dot product attention; on CPUs not below float32, for its backward pass in bfloat16 is far
    slower there for few tokens (torch 2.13)."""
    if query.device.type == "cpu":
        dtype = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(query.to(dtype), key.to(dtype), value.to(dtype), attend, dropout)
    return F.scaled_dot_product_attention(query, key, value, attend, dropout)


@torch.no_grad()
def copy_values_(values: SharedLinear | LowRankLinear, outputs: SharedLinear | LowRankLinear, size: float) -> None:
    """Start values with which attention copies: its value and output maps undo each other.

    A layer then begins by adding the average of what it attends to, not a random mixture of it, and masked prediction
    has a signal for the CNNs from the first step on (compare Trockman and Kolter, "Mimetic Initialization of
    Self-Attention Layers", ICML 2023).

    Args:
        values: its third map is the one of the values.
        outputs: the map after attention.
        size: of what is added, in parts of what it is added to. Smaller for more layers, or all tokens become alike.
    """
    if values.bias.is_meta:
        return  # shapes without values have nothing to start
    if isinstance(values, LowRankLinear) and isinstance(outputs, LowRankLinear):
        dimension, rank = values.shared.shape[1:]
        read, between = (nn.init.orthogonal_(torch.empty(dimension, rank)) for _ in range(2))
        values.shared[2], outputs.shared[0] = size * math.sqrt(dimension) * between, size * math.sqrt(dimension) * read
        # The rotation comes after the private map, and is taken back there.
        values.private[:, 2 * rank:] = rotation_of(values.skew)[:, 2] @ read.mT
        outputs.private[:] = rotation_of(outputs.skew)[:, 0] @ between.mT
    elif isinstance(values, SharedLinear) and isinstance(outputs, SharedLinear):
        turn = nn.init.orthogonal_(torch.empty_like(values.weight[2]))
        values.weight[2], outputs.weight[0] = math.sqrt(size) * turn, math.sqrt(size) * turn.mT


class Encoder(nn.Module):
    """The layers of all Transformers. A weight that is used in several places is registered once.

    `stacks[s][l]` is a layer; with `share_transformers` there is one stack, with `share_layers` one layer a stack.

    Args:
        config: sizes and what is shared.
        transformers: how many Transformers.
    """

    def __init__(self, config: ModelConfig, transformers: int) -> None:
        super().__init__()
        self.transformers, self.layers = transformers, config.layers
        stacks = 1 if config.share_transformers else transformers
        layers = 1 if config.share_layers else config.layers
        self.stacks = nn.ModuleList(
            nn.ModuleList(TransformerLayer(config, transformers // stacks) for _ in range(layers))
            for _ in range(stacks))

    def fold(self) -> list[list[FoldedLayer]]:
        """Every Transformer's linear maps, [transformer][distinct layer]; once a forward, whatever the layers.

        All rotations of the model are one batched matrix exponential.
        """
        stacks = self._stacks()
        layers = [layer for stack in stacks for layer in stack]
        factored = [linear for layer in layers for linear in layer.linears() if isinstance(linear, LowRankLinear)]
        rotations: dict[LowRankLinear, Tensor] = {}
        if factored:
            skews = [linear.skew.flatten(0, 1) for linear in factored]
            together = torch.split(rotation_of(torch.cat(skews)), [len(skew) for skew in skews])
            rotations = {linear: rotation.view_as(linear.skew)
                         for linear, rotation in zip(factored, together, strict=True)}
        folded: list[list[FoldedLayer]] = []
        for stack in stacks:
            # by_layer[l][t]: layer l as the t-th Transformer of this stack uses it
            by_layer = []
            for layer in stack:
                maps = [linear.fold(rotations[linear]) if isinstance(linear, LowRankLinear)
                        else linear.fold(layer.transformers)
                        for linear in layer.linears()]
                by_layer.append([FoldedLayer(*of_one) for of_one in zip(*maps, strict=True)])
            folded += [list(of_one) for of_one in zip(*by_layer, strict=True)]
        return folded

    def forward(self, x: Tensor, present: Tensor, transformer: int, folded: list[list[FoldedLayer]]) -> Tensor:
        """Run one Transformer.

        Args:
            x: (batch, length, D).
            present: (batch, length) boolean; a token that is not present is not attended to, and its output is 0.
            transformer: which one.
            folded: `self.fold()`, made once for all Transformers.

        Returns:
            (batch, length, D).
        """
        # A clip that has no token at all attends to all of its padding: a softmax over nothing would be NaN.
        attend = (present | ~present.any(1, keepdim=True))[:, None, None]
        stacks = self._stacks()
        stack = stacks[transformer if len(stacks) > 1 else 0]
        for index in range(self.layers):
            own = index % len(stack)
            x = stack[own](x, attend, folded[transformer][own])
        return x * present.unsqueeze(-1)

    def _stacks(self) -> list[list[TransformerLayer]]:
        """`self.stacks` with the type that it has."""
        return [[layer for layer in stack if isinstance(layer, TransformerLayer)] for stack in self.stacks
                if isinstance(stack, nn.ModuleList)]
