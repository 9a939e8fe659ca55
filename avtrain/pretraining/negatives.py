"""Content-aware negative sampling, CANS (paper, section 3.2): embeddings -> indices of negatives, and nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sampling_weights(embeddings: Tensor, anchors: Tensor, sampling: str, keep_percent: float) -> Tensor:
    """How likely each candidate is to be drawn first, for each anchor.

    Distances are Euclidean between L2-normalised embeddings, rescaled to [0, 1] over an anchor's candidates.
    Candidates outside the middle `keep_percent` of an anchor's distances are dropped: near duplicates and those too far
    to teach anything. The rest are weighted by 1 - distance (similar) or by the distance (dissimilar).

    Args:
        embeddings: (candidates, channels), the CNN's own, of all present segments of one modality in the batch.
        anchors: (anchors,) index of each positive among them; never its own candidate.
        sampling: similar, dissimilar, or random (all others alike, nothing dropped).
        keep_percent: width of the interval of distances that is kept.

    Returns:
        (anchors, candidates) float32, not normalised, 0 for what must not be drawn.
    """
    itself = F.one_hot(anchors, len(embeddings)).bool()
    if sampling == "random":
        return (~itself).float()
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = F.normalize(embeddings.detach().float(), dim=1)
        # From the inner product: a fraction of the memory of all differences, and exact enough to rank.
        distance = (2 - 2 * unit[anchors] @ unit.T).clamp(min=0).sqrt()
    nearest = distance.masked_fill(itself, torch.inf).amin(1, keepdim=True)
    farthest = distance.masked_fill(itself, -torch.inf).amax(1, keepdim=True)
    distance = (distance - nearest) / (farthest - nearest).clamp(min=1e-12)
    outside = (100 - keep_percent) / 200
    others = distance.masked_fill(itself, torch.nan)
    low, high = (others.nanquantile(share, 1, keepdim=True) for share in (outside, 1 - outside))
    kept = ~itself & (distance >= low) & (distance <= high)
    weights = 1 - distance if sampling == "similar" else distance
    # Never quite 0: candidates that are all equally far would otherwise have no chance at all.
    return weights.clamp(min=1e-6) * kept


def sample_negatives(embeddings: Tensor, anchors: Tensor, count: int, sampling: str, keep_percent: float,
                     generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw negatives without replacement, with probability following `sampling_weights`. No gradient flows.

    Args:
        embeddings, anchors, sampling, keep_percent: as in `sampling_weights`.
        count: negatives an anchor; fewer where there are fewer candidates.
        generator: on the CPU.

    Returns:
        indices: (anchors, up to count) into `embeddings`.
        valid: the same shape, False where an anchor has no more candidates.
    """
    with torch.no_grad():
        weights = sampling_weights(embeddings, anchors, sampling, keep_percent)
        # The largest of log-weight plus Gumbel noise is a draw by weight; the k largest, k draws without replacement.
        uniform = torch.rand(weights.shape, generator=generator).clamp(min=1e-20).to(weights.device)
        keys = weights.log() - (-uniform.log()).log()
        best = keys.topk(min(count, weights.shape[1]), 1)
        return best.indices, best.values > -torch.inf
