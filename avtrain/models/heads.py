"""Classifiers on top of the model: one on the pooled CNN embeddings, one on the multimodal tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avtrain.models.transformer import LAYER_NORM_EPS


class ClipHead(nn.Module):
    """[visual pooled; audio pooled] -> dropout -> Linear; with one modality's features, that modality alone.

    Args:
        features: length of the pooled vectors, joined.
        classes: outputs.
        dropout: probability.
    """

    def __init__(self, features: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(features, classes)

    def forward(self, *pooled: Tensor) -> Tensor:
        """Tensors of (..., features of that modality) -> (..., classes), before softmax."""
        logits: Tensor = self.projection(self.dropout(torch.cat(pooled, -1)))
        return logits


class SequenceHead(nn.Module):
    """LayerNorm(A dropout[BOS_v; h_v,t] + B dropout[BOS_a; h_a,t]) -> Linear, at every segment t.

    Args:
        dimension: D of the tokens.
        classes: outputs.
        dropout: probability.
    """

    def __init__(self, dimension: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.visual = nn.Linear(2 * dimension, dimension, bias=False)
        self.audio = nn.Linear(2 * dimension, dimension, bias=False)
        self.norm = nn.LayerNorm(dimension, eps=LAYER_NORM_EPS)
        self.projection = nn.Linear(dimension, classes)

    def forward(self, multimodal_tokens: Tensor) -> Tensor:
        """(batch, 2 + 2 * segments, D) -> (batch, segments, classes), before softmax."""
        visual, audio = (with_bos(tokens) for tokens in multimodal_tokens.chunk(2, 1))
        joined = self.norm(self.visual(self.dropout(visual)) + self.audio(self.dropout(audio)))
        logits: Tensor = self.projection(joined)
        return logits


def with_bos(tokens: Tensor) -> Tensor:
    """(batch, 1 + segments, D) -> (batch, segments, 2 D): the BOS output beside each segment's."""
    bos, segments = tokens[:, :1], tokens[:, 1:]
    return torch.cat((bos.expand_as(segments), segments), -1)
