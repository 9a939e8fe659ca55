"""Negatives against their stated probabilities."""

import pytest
import torch
from scipy.stats import chisquare

from avtrain.pretraining.negatives import sample_negatives, sampling_weights
from avtrain.pretraining.noise import hashed


def _embeddings(count=60, channels=8, seed=0):
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


def _sampled(embeddings, anchors, count, sampling, seed=0):
    return sample_negatives(embeddings, anchors, hashed(seed, torch.arange(len(anchors))),
                            torch.arange(len(embeddings)), count, sampling, 95.0)


@pytest.mark.parametrize("sampling", ["similar", "dissimilar", "random"])
def test_first_draws_follow_the_stated_probabilities(sampling):
    """Chi-square against weights computed in a plain float64 loop."""
    embeddings, anchor, draws = _embeddings(), 7, 20_000
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    others = [index for index in range(len(unit)) if index != anchor]
    distance = {index: float((unit[anchor] - unit[index]).norm()) for index in others}
    low, high = min(distance.values()), max(distance.values())
    scaled = {index: (value - low) / (high - low) for index, value in distance.items()}
    ranked = torch.tensor(sorted(scaled.values()), dtype=torch.float64)
    bounds = torch.quantile(ranked, torch.tensor([0.025, 0.975], dtype=torch.float64))
    weight = {"random": lambda d: 1.0, "similar": lambda d: 1 - d, "dissimilar": lambda d: d}[sampling]
    stated = {index: weight(value) for index, value in scaled.items()
              if sampling == "random" or bounds[0] <= value <= bounds[1]}
    chosen, valid = _sampled(embeddings, torch.full((draws,), anchor), 1, sampling)
    assert valid.all() and set(chosen.flatten().tolist()) <= set(stated)
    counts = torch.bincount(chosen.flatten(), minlength=60)
    total = sum(stated.values())
    result = chisquare([int(counts[index]) for index in stated], [draws * value / total for value in stated.values()])
    assert result.pvalue > 1e-3
    assert len(stated) == (59 if sampling == "random" else 55)  # 95 % of 59


def test_negatives_are_distinct_never_the_positive_and_inside_the_interval():
    embeddings, anchors = _embeddings(), torch.arange(60)
    for sampling in ("similar", "dissimilar", "random"):
        chosen, valid = _sampled(embeddings, anchors, 20, sampling)
        assert valid.all() and chosen.shape == (60, 20)
        assert not (chosen == anchors[:, None]).any()
        assert all(len(set(row.tolist())) == 20 for row in chosen)
    weights = sampling_weights(embeddings, anchors, "similar", 95.0)
    assert ((weights > 0).sum(1) == 55).all() and (weights[anchors, anchors] == 0).all()


def test_similar_draws_near_ones_and_dissimilar_far_ones():
    embeddings, anchors = _embeddings(200), torch.arange(200)
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    distance = torch.cdist(unit, unit)
    mean = {sampling: float(distance.gather(1, _sampled(embeddings, anchors, 10, sampling)[0]).mean())
            for sampling in ("similar", "random", "dissimilar")}
    assert mean["similar"] < mean["random"] - 0.02 < mean["dissimilar"] - 0.04


@pytest.mark.parametrize("sampling", ["similar", "random"])
def test_anchors_get_the_same_negatives_however_many_at_once(sampling, monkeypatch):
    embeddings, anchors = _embeddings(), torch.tensor([7, 3, 59, 0, 12, 31, 8])
    whole, _ = _sampled(embeddings, anchors, 8, sampling)
    monkeypatch.setattr("avtrain.pretraining.negatives._AT_ONCE", 2 * len(embeddings))
    parts, _ = _sampled(embeddings, anchors, 8, sampling)
    assert torch.equal(parts, whole)


def test_too_few_candidates_are_marked():
    chosen, valid = _sampled(_embeddings(3), torch.tensor([0]), 64, "random")
    assert chosen.shape == (1, 3) and valid.sum() == 2
    assert set(chosen[valid].tolist()) == {1, 2}


def test_no_gradient_reaches_the_sampler():
    embeddings = _embeddings().requires_grad_()
    chosen, _ = _sampled(embeddings, torch.arange(60), 5, "similar")
    assert not chosen.requires_grad
    assert not sampling_weights(embeddings, torch.arange(60), "similar", 95.0).requires_grad
