"""Weights and inputs of the reference, drawn from their names (the rules stand in shared/reference/README.md)."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor


def drawn(name: str, shape: tuple[int, ...], role: str = "input") -> Tensor:
    """A reference tensor by its name, in float64; `role` is the rule for its values."""
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(size=shape)
    if role == "input":
        return torch.from_numpy(np.asarray(z))
    last = name.rpartition(".")[2]
    if last == "base":
        z = np.eye(shape[0])
    elif last == "num_batches_tracked":
        z = np.zeros(shape)
    elif last == "running_var":
        z = 1 + 0.1 * np.abs(z)
    elif last in ("A", "running_mean", "bias"):
        z = 0.1 * z
    elif len(shape) == 1:
        z = 1 + 0.1 * z
    elif "embeddings" in name:
        z = 0.02 * z
    else:
        z = z / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(z))
