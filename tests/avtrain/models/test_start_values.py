"""What a model is before its first step: nothing learned, but ready to learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from avtrain.config import ModelConfig, read_config
from avtrain.models.avbert import AVBert
from avtrain.models.lowrank import LowRankLinear, rotation_of
from avtrain.models.transformer import TransformerLayer
from avtrain.pretraining.objectives import Predictor


def _cosine(embeddings):
    unit = F.normalize(embeddings.flatten(0, 1), dim=1)
    return float((unit @ unit.T).mean().detach())


def test_standardized_projections_tell_segments_apart():
    torch.manual_seed(0)
    model = AVBert(read_config("tiny").model)
    visual = torch.randint(0, 256, (4, 3, 3, 8, 40, 40), dtype=torch.uint8)
    audio = torch.randn(4, 3, 1, 80, 128) - 5
    before, *_ = model.embed(visual, audio)
    model.standardize(visual, audio)
    after, *_ = model.embed(visual, audio)
    for name in ("visual_local", "audio_local"):
        assert _cosine(getattr(before, name)) > 0.4
        assert abs(_cosine(getattr(after, name))) < 0.15
    for pooled, projection in ((after.visual_pooled, model.visual_projection),
                               (after.audio_pooled, model.audio_projection)):
        assert projection(pooled).flatten(0, 1).mean(0).abs().max() < 1e-3


def test_a_modality_without_segments_keeps_its_projection():
    model = AVBert(read_config("tiny").model)
    weight = model.visual_projection.weight.detach().clone()
    absent = torch.zeros(2, 3, dtype=torch.bool)
    model.standardize(torch.zeros(2, 3, 3, 8, 40, 40, dtype=torch.uint8), torch.randn(2, 3, 1, 80, 128), absent, None)
    assert torch.equal(model.visual_projection.weight, weight)


@pytest.mark.parametrize("rank", [None, 32])
def test_attention_begins_by_copying(rank):
    """Value and output maps in a row give back the input, or (low rank) the part of it in a subspace."""
    torch.manual_seed(0)
    config = ModelConfig(dimension=64, heads=4, feedforward=128, layers=4, rank=rank)
    layer = TransformerLayer(config, transformers=2)
    x = torch.randn(5, 7, 64)
    for transformer in range(2):
        values, outputs = ((linear.fold(rotation_of(linear.skew)) if isinstance(linear, LowRankLinear)
                            else linear.fold(2))[transformer] for linear in (layer.attention_in, layer.attention_out))
        copied = outputs.apply(values.apply(x)[2]).squeeze(0).detach()
        if rank is None:
            torch.testing.assert_close(copied, x)  # size 2 / sqrt(4 layers)
        else:
            assert torch.allclose(copied.norm(dim=-1), torch.full((5, 7), 8.0), atol=1e-3)
            # A random 32-dimensional part of 64 dimensions holds half of the squared length.
            assert F.cosine_similarity(copied, x, dim=-1).mean() == pytest.approx(0.5 ** 0.5, abs=0.05)


def test_what_is_alike_scores_higher_from_the_start():
    torch.manual_seed(0)
    outputs = F.layer_norm(torch.randn(40, 128), (128,))
    prediction, projected = Predictor(128)(outputs, outputs)
    scores = prediction @ projected.T
    own, others = scores.diagonal(), scores[~torch.eye(40, dtype=torch.bool)]
    assert own.mean() > others.mean() + 3 * others.std()
