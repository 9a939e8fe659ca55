"""BatchNorm of a training step, shortcut and ReLU in one pass over channels-last maps: kernels for CUDA, in Triton.

Maps are matrices (rows, channels), a row for every place of every segment. The arithmetic is memory traffic: forwards,
maps are read once for their statistics, then read and written; backwards, read once for two sums a channel, then read
and written. Plain operations move half as much again, because the ReLU is another pass in either direction, and so is
the sum of the gradients of a map that is used twice.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from avtrain import ranks

_PROGRAMS = 1024  # of a reduction, at most about so many


class Tile(NamedTuple):
    """What a program works on at a time."""

    rows: int = 64
    most_channels: int = 64
    warps: int = 4


TILE = Tile()
_SIZES = ["rows", "rows_each", "splits"]  # arguments that kernels are not compiled anew for


@triton.jit(do_not_specialize=_SIZES)
def _moments(x, partial, rows, channels, rows_each, splits, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sums of (x - first row) and of its square, of a part of the rows: partial (2, splits, channels)."""
    split = tl.program_id(0)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < channels
    shift = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    first = split.to(tl.int64) * rows_each
    for start in range(0, rows_each, ROWS):
        row = first + start + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & inside[None, :]
        value = tl.load(x + row[:, None] * channels + column[None, :], mask=there, other=0.0).to(tl.float32)
        value = tl.where(there, value - shift[None, :], 0.0)
        total += value
        squares += value * value
    tl.store(partial + split * channels + column, tl.sum(total, 0), mask=inside)
    tl.store(partial + (splits + split) * channels + column, tl.sum(squares, 0), mask=inside)


@triton.jit(do_not_specialize=["rows", "splits"])
def _finish_moments(x, partial, weight, bias, running_mean, running_var, factors, rows, channels, splits, momentum, eps,
                    SPLITS: tl.constexpr, CHANNELS: tl.constexpr):
    """factors (4, channels): scale, offset, mean, 1 / deviation; and the running statistics."""
    column = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < channels
    split = tl.arange(0, SPLITS)
    there = (split < splits)[:, None] & inside[None, :]
    at = partial + split[:, None] * channels + column[None, :]
    mean = tl.sum(tl.load(at, mask=there, other=0.0), 0) / rows
    squares = tl.sum(tl.load(at + splits * channels, mask=there, other=0.0), 0) / rows
    variance = tl.maximum(squares - mean * mean, 0.0)
    mean += tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(variance + eps)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) * inverse
    tl.store(factors + column, scale, mask=inside)
    tl.store(factors + channels + column,
             tl.load(bias + column, mask=inside, other=0.0).to(tl.float32) - mean * scale, mask=inside)
    tl.store(factors + 2 * channels + column, mean, mask=inside)
    tl.store(factors + 3 * channels + column, inverse, mask=inside)
    unbiased = variance * (rows / tl.maximum(rows - 1.0, 1.0))
    old = tl.load(running_mean + column, mask=inside, other=0.0)
    tl.store(running_mean + column, old + momentum * (mean - old), mask=inside)
    old = tl.load(running_var + column, mask=inside, other=0.0)
    tl.store(running_var + column, old + momentum * (unbiased - old), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _apply(x, shortcut, y, factors, rows, channels, SHORTCUT: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr,
           CHANNELS: tl.constexpr):
    """y = relu(x * scale + offset + shortcut)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < channels
    there = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * channels + column[None, :]
    scale = tl.load(factors + column, mask=inside, other=0.0)
    offset = tl.load(factors + channels + column, mask=inside, other=0.0)
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32) * scale[None, :] + offset[None, :]
    if SHORTCUT:
        value += tl.load(shortcut + at, mask=there, other=0.0).to(tl.float32)
    if RELU:
        value = tl.maximum(value, 0.0)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_SIZES)
def _gradient_sums(x, y, gradient, other, masked, factors, partial, rows, channels, rows_each, splits,
                   MASK: tl.constexpr, FORK: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sums of the gradient before the ReLU, and of it times (x - mean): partial (2, splits, channels).

    MASK: 0 without ReLU; 1 its sign is recomputed from x; 2 read from y, where there is a shortcut: then the gradient
    before the ReLU, which is the shortcut's, is written too. FORK: the gradient is the sum of two.
    """
    split = tl.program_id(0)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < channels
    scale = tl.load(factors + column, mask=inside, other=0.0)
    offset = tl.load(factors + channels + column, mask=inside, other=0.0)
    mean = tl.load(factors + 2 * channels + column, mask=inside, other=0.0)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    products = tl.zeros((ROWS, CHANNELS), tl.float32)
    first = split.to(tl.int64) * rows_each
    for start in range(0, rows_each, ROWS):
        row = first + start + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * channels + column[None, :]
        value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        slope = tl.load(gradient + at, mask=there, other=0.0).to(tl.float32)
        if FORK:
            slope += tl.load(other + at, mask=there, other=0.0).to(tl.float32)
        if MASK == 1:
            slope = tl.where(value * scale[None, :] + offset[None, :] > 0, slope, 0.0)
        if MASK == 2:
            slope = tl.where(tl.load(y + at, mask=there, other=0.0).to(tl.float32) > 0, slope, 0.0)
            rounded = slope.to(masked.dtype.element_ty)
            tl.store(masked + at, rounded, mask=there)
            slope = rounded.to(tl.float32)
        total += slope
        products += slope * (value - mean[None, :])
    tl.store(partial + split * channels + column, tl.sum(total, 0), mask=inside)
    tl.store(partial + (splits + split) * channels + column, tl.sum(products, 0), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _finish_sums(partial, factors, weight_gradient, bias_gradient, slopes, rows, channels, splits,
                 SPLITS: tl.constexpr, CHANNELS: tl.constexpr):
    """Gradients of weight and bias; slopes (2, channels): the gradient of x is scale * g + slope * x + constant."""
    column = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < channels
    split = tl.arange(0, SPLITS)
    there = (split < splits)[:, None] & inside[None, :]
    at = partial + split[:, None] * channels + column[None, :]
    total = tl.sum(tl.load(at, mask=there, other=0.0), 0)
    products = tl.sum(tl.load(at + splits * channels, mask=there, other=0.0), 0)
    scale = tl.load(factors + column, mask=inside, other=0.0)
    mean = tl.load(factors + 2 * channels + column, mask=inside, other=0.0)
    inverse = tl.load(factors + 3 * channels + column, mask=inside, other=0.0)
    tl.store(weight_gradient + column, products * inverse, mask=inside)
    tl.store(bias_gradient + column, total, mask=inside)
    slope = -scale * inverse * inverse * products / rows
    tl.store(slopes + column, slope, mask=inside)
    tl.store(slopes + channels + column, -scale * total / rows - slope * mean, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _gradients(x, gradient, factors, slopes, of_x, rows, channels, MASK: tl.constexpr, ROWS: tl.constexpr,
               CHANNELS: tl.constexpr):
    """The gradient of x. MASK: 1 where the ReLU's sign is recomputed from x."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = column < channels
    there = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * channels + column[None, :]
    scale = tl.load(factors + column, mask=inside, other=0.0)
    offset = tl.load(factors + channels + column, mask=inside, other=0.0)
    slope = tl.load(slopes + column, mask=inside, other=0.0)
    constant = tl.load(slopes + channels + column, mask=inside, other=0.0)
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    above = tl.load(gradient + at, mask=there, other=0.0).to(tl.float32)
    if MASK == 1:
        above = tl.where(value * scale[None, :] + offset[None, :] > 0, above, 0.0)
    below = above * scale[None, :] + value * slope[None, :] + constant[None, :]
    tl.store(of_x + at, below.to(of_x.dtype.element_ty), mask=there)


def factors(x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float,
            eps: float) -> Tensor:
    """Measure this batch, and move the running statistics: (4, channels), scale, offset, mean, 1 / deviation.

    Args:
        x: (batch, channels, ...), see `laid_out`.
        weight, bias, running_mean, running_var: (channels,).
        momentum: of the running statistics.
        eps: added to the variance.
    """
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    tile, splits, rows_each = _tiling(rows, channels)
    partial = torch.empty(2, splits, channels, device=x.device)
    found = torch.empty(4, channels, device=x.device)
    _moments[(splits, triton.cdiv(channels, tile))](
        x, partial, rows, channels, rows_each, splits, ROWS=TILE.rows, CHANNELS=tile, num_warps=TILE.warps)
    _finish_moments[(triton.cdiv(channels, 16),)](
        x, partial, weight, bias, running_mean, running_var, found, rows, channels, splits, momentum, eps,
        SPLITS=triton.next_power_of_2(splits), CHANNELS=16)
    return found


class FusedNorm(torch.autograd.Function):
    """relu(batch_norm(x) + shortcut) with the statistics of this batch.

    Arguments: x (batch, channels, ...), shortcut of the same shape or None, weight, bias, what `factors` gives for x
    and these, rows of all processes or None where only this one's were measured, relu, fork. Maps are dense in
    channels-last order: see `laid_out`. With `fork`, which asks for a shortcut and relu, the map is returned twice, so
    that the gradients of its two uses need no adding beforehand.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, factors: Tensor,
                of_all: Tensor | None, relu: bool, fork: bool) -> Any:
        rows, channels = x.numel() // x.shape[1], x.shape[1]
        tile, _, _ = _tiling(rows, channels)
        y = torch.empty_like(x)
        _apply[(triton.cdiv(rows, TILE.rows), triton.cdiv(channels, tile))](
            x, x if shortcut is None else shortcut, y, factors, rows, channels, SHORTCUT=shortcut is not None,
            RELU=relu, ROWS=TILE.rows, CHANNELS=tile, num_warps=TILE.warps)
        context.mask = 0 if not relu else 1 if shortcut is None else 2
        context.save_for_backward(x, y if context.mask == 2 else None, factors, of_all)
        context.with_shortcut = shortcut is not None
        context.set_materialize_grads(False)
        return (y, y.detach()) if fork else y

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [laid_out(gradient) for gradient in gradients if gradient is not None]
        if not given:
            return (None,) * 8
        x, y, factors, of_all = context.saved_tensors
        mask = context.mask
        rows, channels = x.numel() // x.shape[1], x.shape[1]
        tile, splits, rows_each = _tiling(rows, channels)
        columns, shape = triton.cdiv(channels, tile), {"ROWS": TILE.rows, "CHANNELS": tile, "num_warps": TILE.warps}
        partial = torch.empty(2, splits, channels, device=x.device)
        of_weight, of_bias, *slopes = torch.empty(4, channels, device=x.device).split((1, 1, 2))
        masked = torch.empty_like(x) if mask == 2 else given[0]
        _gradient_sums[(splits, columns)](
            x, x if y is None else y, given[0], given[-1], masked, factors, partial, rows, channels, rows_each, splits,
            MASK=mask, FORK=len(given) == 2, **shape)
        _finish_sums[(triton.cdiv(channels, 16),)](
            partial, factors, of_weight, of_bias, slopes[0], rows, channels, splits,
            SPLITS=triton.next_power_of_2(splits), CHANNELS=16)
        if of_all is not None:  # sums and rows of all processes
            scale, _, mean, inverse = factors
            of_biases, of_weights = ranks.summed(torch.cat((of_bias, of_weight)))
            slopes[0][0] = -scale * inverse * of_weights / of_all
            slopes[0][1] = -scale * of_biases / of_all - slopes[0][0] * mean
        of_x = torch.empty_like(x)
        _gradients[(triton.cdiv(rows, TILE.rows), columns)](
            x, masked, factors, slopes[0], of_x, rows, channels, MASK=mask % 2, **shape)
        below = masked if context.with_shortcut else None
        return of_x, below, of_weight[0], of_bias[0], None, None, None, None


def laid_out(x: Tensor) -> Tensor:
    """`x` dense in channels-last order, (batch, ..., channels) in memory; copied only where it is not."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _tiling(rows: int, channels: int) -> tuple[int, int, int]:
    """(channels of a tile, parts that the rows are reduced in, rows of a part)."""
    tile = min(TILE.most_channels, triton.next_power_of_2(channels))
    splits = max(1, min(triton.cdiv(rows, 4 * TILE.rows), _PROGRAMS // triton.cdiv(channels, tile)))
    rows_each = triton.cdiv(triton.cdiv(rows, splits), TILE.rows) * TILE.rows
    return tile, triton.cdiv(rows, rows_each), rows_each
