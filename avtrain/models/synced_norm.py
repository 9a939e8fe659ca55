"""BatchNorm over the segments of all processes. torch's own refuses CPU tensors and segments that one process lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from avtrain import ranks
from avtrain.models.recomputation import kept
from avtrain.runtime import at_least_float32


def is_over_ranks(norm: nn.Module) -> bool:
    """Whether it measures over all processes now."""
    return norm.training and getattr(norm, "over_ranks", False)


def normed_over_ranks(x: Tensor, norm: _BatchNorm) -> Tensor:
    """norm(x) with the statistics of all processes' x; (n, channels, ...), where n may be 0 and differ."""
    dimensions = [0, *range(2, x.dim())]

    def measured() -> Tensor:
        values, count = at_least_float32(x), x.numel() // x.shape[1]
        if not count:
            return moved(norm, values.new_zeros(x.shape[1]), values.new_zeros(x.shape[1]), 0)
        variance, mean = torch.var_mean(values, dimensions, correction=0)
        return moved(norm, mean, variance * count, count)

    normed: Tensor = _Norm.apply(x, norm.weight, norm.bias, kept(norm, measured))  # type: ignore[no-untyped-call]
    return normed


@torch.no_grad()
def moved(norm: _BatchNorm, mean: Tensor, squares: Tensor, count: int) -> Tensor:
    """Put the processes' measures together, and move the running statistics.

    Args:
        norm: whose measures they are.
        mean: (channels,) of this process.
        squares: (channels,) its sum of squared distances from it.
        count: of its values a channel.

    Returns:
        (3, channels): mean, 1 / deviation, and number of values of all processes.
    """
    each = ranks.gathered(torch.cat((mean, squares, mean.new_full((1,), count)))[None])
    counts, channels = each[:, -1:], len(mean)
    total = counts.sum().clamp(min=1)
    of_all = (each[:, :channels] * counts).sum(0) / total
    apart = (each[:, :channels] - of_all).square() * counts
    variance = (each[:, channels:-1] + apart).sum(0) / total
    assert norm.momentum is not None
    weight = norm.momentum * (counts.sum() > 0)
    if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
        norm.running_mean.lerp_(of_all.to(norm.running_mean.dtype), weight.to(norm.running_mean.dtype))
        unbiased = variance * total / (total - 1).clamp(min=1)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), weight.to(norm.running_var.dtype))
        norm.num_batches_tracked.add_(1)
    return torch.stack((of_all, (variance + norm.eps).rsqrt(), total.expand(channels)))


class _Norm(torch.autograd.Function):
    """(x - mean) / deviation * weight + bias, where mean and deviation are those of all processes' x."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor, found: Tensor) -> Tensor:
        mean, inverse, _ = _columns(found, x)
        context.save_for_backward(x, weight, found)
        scale = inverse * _column(weight, x)
        return ((x - mean) * scale + _column(bias, x)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, found = context.saved_tensors
        mean, inverse, count = _columns(found, x)
        above, places = gradient.to(found.dtype), (x - mean) * inverse
        dimensions = [0, *range(2, x.dim())]
        own = torch.stack((above.sum(dimensions), (above * places).sum(dimensions)))
        total = ranks.summed(own)
        below = (above - (_column(total[0], x) + places * _column(total[1], x)) / count) * inverse * _column(weight, x)
        return below.to(x.dtype), own[1].to(weight.dtype), own[0].to(weight.dtype), None


def _columns(found: Tensor, x: Tensor) -> list[Tensor]:
    return [_column(row, x) for row in found]


def _column(values: Tensor, x: Tensor) -> Tensor:
    """(channels,) as (1, channels, 1, ...)."""
    return values.view(1, -1, *(1,) * (x.dim() - 2))
