"""Random numbers from places instead of from a generator's state: the same on any device, in any order, by any process.

A number is hashed from integers that name what it is for (seed, step, purpose, draw, clip, segment), each mixed in by
the finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64; sums and products wrap around, as they should
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def hashed(*names: int | Tensor) -> Tensor:
    """One int64 hash for every combination of names.

    Args:
        names: int64 tensors that broadcast against each other, or integers; their order matters.
    """
    mixed = torch.zeros((), dtype=torch.int64)
    for name in names:
        mixed = mixed_in(mixed, name)
    return mixed


def mixed_in(mixed: Tensor, name: int | Tensor) -> Tensor:
    """The hash of what has been hashed, and one name more."""
    z = mixed * 3 + name + _GOLDEN
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def uniforms(hashes: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers above 0 and under 1, of as many bits as a float of that type has."""
    bits = 53 if dtype == torch.float64 else 23
    return (_shifted(hashes, 64 - bits).to(dtype) + 0.5) * 2.0**-bits


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills up with zeros, where int64's own fills up with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
