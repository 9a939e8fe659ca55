"""The factored linear layer whose large half is shared by the Transformers (paper, section 3.1; W = U S V^T).

For row vectors x and Transformer m:  y = normalize(x V_m^T) R_m U^T + b.
U and b are shared, V_m and the rotation R_m belong to Transformer m.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from avtrain.runtime import without_autocast


class FoldedLinear(NamedTuple):
    """`maps` linear maps of the same input, ready to be applied any number of times."""

    down: Tensor | None  # (maps * rank, inputs); None: the maps are not factored
    up: Tensor           # (maps, rank, outputs), or (maps, inputs, outputs) where `down` is None
    bias: Tensor         # (maps, 1, outputs)

    def apply(self, x: Tensor) -> Tensor:
        """(batch, length, inputs) -> (maps, batch, length, outputs)."""
        maps, inner, _ = self.up.shape
        if self.down is None:
            hidden = x.flatten(0, 1).expand(maps, -1, -1)
        else:
            hidden = F.linear(x.flatten(0, 1), self.down).view(-1, maps, inner)  # (batch * length, maps, rank)
            hidden = F.normalize(hidden, dim=-1).transpose(0, 1)
        return torch.baddbmm(self.bias, hidden, self.up).view(maps, *x.shape[:2], -1)


class SharedLinear(nn.Module):
    """`maps` linear maps of one input, equal for all Transformers: the case without low rank.

    Args:
        inputs, outputs: features in and out of each map.
        maps: how many maps (3 for query, key and value, else 1).
    """

    def __init__(self, inputs: int, outputs: int, maps: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(maps, outputs, inputs) * 0.02)
        self.bias = nn.Parameter(torch.zeros(maps * outputs))

    def fold(self, transformers: int) -> list[FoldedLinear]:
        """The maps as each of the Transformers uses them: the very same for all."""
        weight = compute_dtype(self.weight.mT)
        return [FoldedLinear(None, weight, compute_dtype(self.bias).view(len(weight), 1, -1))] * transformers


class LowRankLinear(nn.Module):
    """`maps` factored linear maps of one input, with U shared by the Transformers and S V^T private to each.

    Args:
        inputs, outputs: features in and out of each map.
        rank: O, the inner dimension.
        transformers: how many Transformers share U.
        maps: how many maps (3 for query, key and value, else 1).
    """

    def __init__(self, inputs: int, outputs: int, rank: int, transformers: int, maps: int = 1) -> None:
        super().__init__()
        # A normalised inner vector has unit length whatever the scale of V. Entries of U with this deviation give
        # outputs the size that a BERT linear layer (deviation 0.02, inputs of unit scale) has at its start.
        self.shared = nn.Parameter(torch.randn(maps, outputs, rank) * 0.02 * math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(maps * outputs))
        self.private = nn.Parameter(torch.randn(transformers, maps * rank, inputs) * 0.02)
        self.skew = nn.Parameter(rotation_blocks(transformers * maps, rank).view(transformers, maps, rank, rank))

    def fold(self, rotations: Tensor) -> list[FoldedLinear]:
        """The maps as each Transformer uses them, its rotations multiplied into U.

        Args:
            rotations: (transformers, maps, rank, rank), `rotation_of(self.skew)`.
        """
        up = rotations @ self.shared.to(rotations.dtype).mT  # (transformers, maps, rank, outputs)
        bias = compute_dtype(self.bias).view(len(self.shared), 1, -1)
        return [FoldedLinear(down, up, bias) for down, up in zip(compute_dtype(self.private).unbind(),
                                                                 compute_dtype(up).unbind(), strict=True)]


def rotation_of(skew: Tensor) -> Tensor:
    """The matrix exponential of (upper triangle of `skew`) - (its transpose): orthogonal whatever `skew` holds.

    Never below float32, also under autocast: rounding to bfloat16 would cost the orthogonality.

    Args:
        skew: (..., rank, rank); diagonal and lower triangle are not used.

    Returns:
        (..., rank, rank), float32 (float64 for float64).
    """
    with without_autocast(skew):
        upper = skew.to(torch.promote_types(skew.dtype, torch.float32)).triu(1)
        rotation: Tensor = _Exponential.apply(upper - upper.mT)  # type: ignore[no-untyped-call]
        return rotation


class _Exponential(torch.autograd.Function):
    """torch.linalg.matrix_exp with a backward pass three times as fast.

    The gradient is the derivative of exp at A^T in the direction of the incoming gradient G. torch takes it from the
    exponential of a real matrix of twice the size; here it is the imaginary part of exp(A^T + i h G) / h, a complex
    matrix of the same size. Nothing cancels, so h can be small enough for the error, O(h^2), to be below rounding.
    """

    @staticmethod
    def forward(context: FunctionCtx, matrix: Tensor) -> Tensor:
        context.save_for_backward(matrix)
        return exponential(matrix)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        matrix, = context.saved_tensors
        limits = torch.finfo(matrix.dtype)
        step = limits.eps ** 0.5 / gradient.abs().amax((-2, -1), keepdim=True).clamp(min=limits.tiny ** 0.5)
        direction: Tensor = exponential(torch.complex(matrix.mT.contiguous(), gradient * step)).imag / step
        return direction


def exponential(matrix: Tensor) -> Tensor:
    """torch.linalg.matrix_exp; on CUDA without its waits for the device, which chooses its degrees by norm."""
    if matrix.is_cuda:
        return scaled_and_squared(matrix)
    plain: Tensor = torch.linalg.matrix_exp(matrix)
    return plain


def scaled_and_squared(matrix: Tensor, halvings: int = 7) -> Tensor:
    """exp(A) = exp(A / 128)^128, by a Taylor polynomial of degree 8: exact to float32 for norms up to 64.

    E = exp - 1 is squared, as 2 E + E^2: the error then grows with E, not from 1 on.

    Args:
        matrix: (batch, n, n), real or complex.
    """
    one = matrix * 0.5 ** halvings
    two = one @ one
    three, four = two @ one, two @ two
    least = one + two / 2 + three / 6 + four / 24
    less = torch.baddbmm(least, four, one / 120 + two / 720 + three / 5040 + four / 40320)
    for _ in range(halvings):
        less = torch.baddbmm(less, less, less, beta=2)
    return less + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def rotation_blocks(count: int, rank: int) -> Tensor:
    """Start values for `rotation_of`: 2 x 2 blocks of random angles along the diagonal, (count, rank, rank)."""
    angle = torch.rand(count, rank // 2) * (math.pi / 2)
    entry = torch.zeros(count, rank - 1)
    entry[:, ::2] = -((1 - angle.cos()) / (1 + angle.cos())).sqrt()
    upper = torch.diag_embed(entry, offset=1)
    return upper - upper.mT


def compute_dtype(x: Tensor) -> Tensor:
    """`x` as autocast would have it, so that weights are cast once a step instead of at every layer."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # meta tensors have none
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
