"""BatchNorm of a training step, shortcut and ReLU in one pass over channels-last maps: kernels for CUDA, in Triton.

Maps are matrices (rows, channels), a row for every place of every segment. The arithmetic is memory traffic: forwards,
maps are read once for their statistics, then read and written; backwards, read once for two sums a channel, then read
and written. Plain operations move half as much again, because the ReLU is another pass in either direction.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

_ROWS, _MOST_CHANNELS = 64, 64  # of a program's tile
_PROGRAMS = 1024  # of a reduction, at most about so many
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
def _gradient_sums(x, y, gradient, factors, partial, rows, channels, rows_each, splits, MASK: tl.constexpr,
                   ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sums of the gradient before the ReLU, and of it times (x - mean): partial (2, splits, channels).

    MASK: 0 without ReLU; 1 its sign is recomputed from x; 2 read from y, where there is a shortcut.
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
        if MASK == 1:
            slope = tl.where(value * scale[None, :] + offset[None, :] > 0, slope, 0.0)
        if MASK == 2:
            slope = tl.where(tl.load(y + at, mask=there, other=0.0).to(tl.float32) > 0, slope, 0.0)
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
def _gradients(x, y, gradient, factors, slopes, of_x, of_shortcut, rows, channels, MASK: tl.constexpr,
               SHORTCUT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The gradients of x and of the shortcut."""
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
    if MASK == 2:
        above = tl.where(tl.load(y + at, mask=there, other=0.0).to(tl.float32) > 0, above, 0.0)
    below = above * scale[None, :] + value * slope[None, :] + constant[None, :]
    tl.store(of_x + at, below.to(of_x.dtype.element_ty), mask=there)
    if SHORTCUT:
        tl.store(of_shortcut + at, above.to(of_shortcut.dtype.element_ty), mask=there)


class FusedNorm(torch.autograd.Function):
    """relu(batch_norm(x) + shortcut) with the statistics of this batch, which also move the running ones.

    Arguments: x (batch, channels, ...), shortcut of the same shape or None, weight, bias, running_mean, running_var,
    momentum, eps, relu. All maps are dense in channels-last order: see `rows_of`.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, running_mean: Tensor,
                running_var: Tensor, momentum: float, eps: float, relu: bool) -> Tensor:
        rows, channels = x.numel() // x.shape[1], x.shape[1]
        tile, splits, rows_each = _tiling(rows, channels)
        columns = triton.cdiv(channels, tile)
        partial = torch.empty(2, splits, channels, device=x.device)
        factors = torch.empty(4, channels, device=x.device)
        _moments[(splits, columns)](x, partial, rows, channels, rows_each, splits, ROWS=_ROWS, CHANNELS=tile)
        _finish_moments[(triton.cdiv(channels, 16),)](
            x, partial, weight, bias, running_mean, running_var, factors, rows, channels, splits, momentum, eps,
            SPLITS=triton.next_power_of_2(splits), CHANNELS=16)
        y = torch.empty_like(x)
        _apply[(triton.cdiv(rows, _ROWS), columns)](
            x, x if shortcut is None else shortcut, y, factors, rows, channels, SHORTCUT=shortcut is not None,
            RELU=relu, ROWS=_ROWS, CHANNELS=tile)
        context.mask = 0 if not relu else 1 if shortcut is None else 2
        context.save_for_backward(x, y if context.mask == 2 else None, factors)
        context.with_shortcut = shortcut is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(context: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, factors = context.saved_tensors  # type: ignore[attr-defined]
        mask, with_shortcut = context.mask, context.with_shortcut  # type: ignore[attr-defined]
        gradient = laid_out(gradient)
        rows, channels = x.numel() // x.shape[1], x.shape[1]
        tile, splits, rows_each = _tiling(rows, channels)
        columns = triton.cdiv(channels, tile)
        partial = torch.empty(2, splits, channels, device=x.device)
        of_weight, of_bias, *slopes = torch.empty(4, channels, device=x.device).split((1, 1, 2))
        y = x if y is None else y
        _gradient_sums[(splits, columns)](x, y, gradient, factors, partial, rows, channels, rows_each, splits,
                                          MASK=mask, ROWS=_ROWS, CHANNELS=tile)
        _finish_sums[(triton.cdiv(channels, 16),)](
            partial, factors, of_weight, of_bias, slopes[0], rows, channels, splits,
            SPLITS=triton.next_power_of_2(splits), CHANNELS=16)
        of_x = torch.empty_like(x)
        of_shortcut = torch.empty_like(x) if with_shortcut and mask else None
        _gradients[(triton.cdiv(rows, _ROWS), columns)](
            x, y, gradient, factors, slopes[0], of_x, x if of_shortcut is None else of_shortcut, rows, channels,
            MASK=mask, SHORTCUT=of_shortcut is not None, ROWS=_ROWS, CHANNELS=tile)
        below = gradient if with_shortcut and not mask else of_shortcut
        return of_x, below, of_weight[0], of_bias[0], None, None, None, None, None


def laid_out(x: Tensor) -> Tensor:
    """`x` dense in channels-last order, (batch, ..., channels) in memory; copied only where it is not."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _tiling(rows: int, channels: int) -> tuple[int, int, int]:
    """(channels of a tile, parts that the rows are reduced in, rows of a part)."""
    tile = min(_MOST_CHANNELS, triton.next_power_of_2(channels))
    splits = max(1, min(triton.cdiv(rows, 4 * _ROWS), _PROGRAMS // triton.cdiv(channels, tile)))
    rows_each = triton.cdiv(triton.cdiv(rows, splits), _ROWS) * _ROWS
    return tile, triton.cdiv(rows, rows_each), rows_each
