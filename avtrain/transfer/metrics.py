"""Figures of predictions: top-k, mean average precision, bootstrap intervals, confusion. NumPy in, numbers out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_TOP1_RESAMPLES, _MAP_RESAMPLES = 2000, 200


def top_k(scores: Floats, labels: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """Whether the right class is among the k with the highest scores, for each row.

    Args:
        scores: (videos, classes).
        labels: (videos,).
        k: at most the number of classes counts.
    """
    best = np.argsort(-scores, 1, kind="stable")[:, :k]
    return np.asarray((best == labels[:, None]).any(1))


def mean_average_precision(scores: Floats, targets: NDArray[np.bool_], weights: Floats | None = None) -> Floats:
    """Average precision, averaged over the classes that have a positive.

    Args:
        scores: (videos, classes).
        targets: (videos, classes).
        weights: (resamples, videos), how often each counts; None: once.

    Returns:
        (resamples,): one value without weights; nan where no class has a positive.
    """
    weights = np.ones((1, len(scores))) if weights is None else weights
    sums, counts = np.zeros(len(weights)), np.zeros(len(weights))
    for column in range(scores.shape[1]):
        positives = weights @ targets[:, column]
        there = positives > 0
        if there.any():
            sums[there] += _average_precision(scores[:, column], targets[:, column], weights[there])
            counts += there
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _average_precision(scores: Floats, targets: NDArray[np.bool_], weights: Floats) -> Floats:
    """Precision at each threshold, weighted by the recall it adds, for each row of weights."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last_of_ties = np.append(ordered[1:] != ordered[:-1], True)
    found = np.cumsum(weights[:, order] * targets[order], 1)[:, last_of_ties]
    retrieved = np.cumsum(weights[:, order], 1)[:, last_of_ties]
    precision = found / np.maximum(retrieved, 1e-12)
    recall = found / found[:, -1:]
    return np.asarray((np.diff(recall, prepend=0.0) * precision).sum(1))


def bootstrap_means(values: NDArray[np.bool_], seed: int) -> Floats:
    """Means of resamples with replacement of the videos."""
    random = np.random.default_rng(seed)
    draws = [values[random.integers(len(values), size=len(values))].mean() for _ in range(_TOP1_RESAMPLES)]
    return np.asarray(draws)


def bootstrap_map(scores: Floats, targets: NDArray[np.bool_], seed: int) -> Floats:
    """Mean average precision of resamples with replacement of the videos."""
    random = np.random.default_rng(seed)
    weights = random.multinomial(len(scores), np.full(len(scores), 1 / len(scores)), size=_MAP_RESAMPLES)
    draws = mean_average_precision(scores, targets, weights.astype(np.float64))
    return draws[~np.isnan(draws)]


def interval(draws: Floats) -> tuple[float, float]:
    """The middle 95 % of bootstrap draws."""
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


def confusion(scores: Floats, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """(classes, classes): how often a video of the row's class was taken for the column's."""
    counts = np.zeros((scores.shape[1], scores.shape[1]), np.int64)
    np.add.at(counts, (labels, scores.argmax(1)), 1)
    return counts
