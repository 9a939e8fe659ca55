"""Content-aware negative sampling, CANS (paper, section 3.2): embeddings -> indices of negatives, and nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from avtrain.pretraining.noise import mixed_in, uniforms
from avtrain.runtime import without_autocast

_AT_ONCE = 2**22  # pairs of anchor and candidate


def sampling_weights(embeddings: Tensor, anchors: Tensor, sampling: str, keep_percent: float,
                     usable: Tensor | None = None) -> Tensor:
    """How likely each candidate is to be drawn first, for each anchor.

    Distances are Euclidean between L2-normalised embeddings, rescaled to [0, 1] over an anchor's candidates.
    Candidates outside the middle `keep_percent` of an anchor's distances are dropped: near duplicates and those too far
    to teach anything. The rest are weighted by 1 - distance (similar) or by the distance (dissimilar).

    Args:
        embeddings: (candidates, channels), the CNN's own, of all present segments of one modality in the batch.
        anchors: (anchors,) index of each positive among them; never its own candidate.
        sampling: similar, dissimilar, or random (all others alike, nothing dropped).
        keep_percent: width of the interval of distances that is kept.
        usable: (candidates,) boolean, others are as if they were not there; None: all.

    Returns:
        (anchors, candidates), not normalised, 0 for what must not be drawn; float64 of float64, else float32.
    """
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    out = anchors[:, None] == torch.arange(len(embeddings), device=anchors.device)
    if usable is not None:
        out = out | ~usable
    if sampling == "random":
        return (~out).to(dtype)
    with without_autocast(embeddings):
        unit = F.normalize(embeddings.detach().to(dtype), dim=1)
        # From the inner product: a fraction of the memory of all differences, and exact enough to rank.
        distance = (2 - 2 * unit[anchors] @ unit.T).clamp(min=0).sqrt()
    nearest = distance.masked_fill(out, torch.inf).amin(1, keepdim=True)
    farthest = distance.masked_fill(out, -torch.inf).amax(1, keepdim=True)
    distance = (distance - nearest) / (farthest - nearest).clamp(min=1e-12)
    outside = (100 - keep_percent) / 200
    others = distance.masked_fill(out, torch.nan)
    low, high = (others.nanquantile(share, 1, keepdim=True) for share in (outside, 1 - outside))
    kept = ~out & (distance >= low) & (distance <= high)
    weights = 1 - distance if sampling == "similar" else distance
    # Never quite 0: candidates that are all equally far would otherwise have no chance at all.
    return weights.clamp(min=1e-6) * kept


def sample_negatives(embeddings: Tensor, anchors: Tensor, noise: Tensor, places: Tensor, count: int, sampling: str,
                     keep_percent: float, usable: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw negatives without replacement, with probability following `sampling_weights`. No gradient flows.

    Anchors are taken some at a time: a batch of 256 clips has 3,840 candidates, and all of them for all anchors and
    draws would grow with the square.

    Args:
        embeddings, anchors, sampling, keep_percent, usable: as in `sampling_weights`.
        noise: (anchors,) int64, a hash for each anchor.
        places: (candidates,) int64, what the candidates are called; with the hash it decides.
        count: negatives an anchor; fewer where there are fewer candidates.

    Returns:
        indices: (anchors, up to count) into `embeddings`.
        valid: the same shape, False where an anchor has no more candidates.
    """
    if not len(anchors):
        return anchors.new_zeros(0, 0), anchors.new_zeros(0, 0, dtype=torch.bool)
    indices, valid = [], []
    with torch.no_grad():
        at_once = max(1, _AT_ONCE // len(places))
        for first in range(0, len(anchors), at_once):
            some = slice(first, first + at_once)
            weights = sampling_weights(embeddings, anchors[some], sampling, keep_percent, usable)
            # The largest of weight / exponential noise is a draw by weight; the k largest, k without replacement.
            uniform = uniforms(mixed_in(noise[some, None], places), weights.dtype)
            best = (weights / -uniform.log()).topk(min(count, weights.shape[1]), 1)
            indices.append(best.indices)
            valid.append(best.values > 0)
    return torch.cat(indices), torch.cat(valid)
