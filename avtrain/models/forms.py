"""Other forms of the visual CNN's operations that give full kernels on CUDA. Each computes the same function.

Maps lie channels-last: (batch, channels, frames, height, width) is (batch, frames, height, width, channels) in memory,
so joining batch and frames, or height and width, copies nothing, and 2-D kernels, which are better tuned, apply.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from avtrain.models.recomputation import kept
from avtrain.models.synced_norm import is_over_ranks, moved


@dataclass
class Forms:
    """Which forms are used on CUDA. CPUs keep the plain ones, all but `temporal`.

    The defaults are what was right and fastest on an H100 (docs/performance.md).
    """

    temporal: bool = True
    """(k, 1, 1) convolutions as (k, 1) ones over frames and pixels."""
    spatial: bool = True
    """(1, k, k) convolutions as 2-D ones over single frames."""
    pointwise: str = "convolution"
    """(1, 1, 1) convolutions: plain, 2-D convolution, or linear (a matrix product)."""
    stem: bool = True
    """The stem as a 2-D convolution whose input channels are frames and 2 x 2 pixels."""
    pool: bool = True
    """The stem's pooling as a 2-D one."""
    norm: bool = True
    """BatchNorm, shortcut and ReLU in one pass in training (Triton, where it is installed)."""
    fork: bool = True
    """With `norm`, gradients of a map that is used twice are added in the kernels of its BatchNorm."""
    kernels: bool = True
    """Kernels of our own (Triton) for the stem's input, from bytes in one pass, and for its pooling."""


ACTIVE = Forms()


@contextmanager
def using(**changes: bool | str) -> Iterator[None]:
    """Other forms for a while."""
    before = {field.name: getattr(ACTIVE, field.name) for field in fields(ACTIVE)}
    vars(ACTIVE).update(changes)
    try:
        yield
    finally:
        vars(ACTIVE).update(before)


def frames_apart(x: Tensor) -> Tensor:
    """(batch, channels, frames, height, width) -> (batch * frames, channels, height, width), a view."""
    return x.transpose(1, 2).flatten(0, 1)


def frames_joined(x: Tensor, batch: int) -> Tensor:
    """The inverse of `frames_apart`, a view."""
    apart: Tensor = x.unflatten(0, (batch, -1))
    return apart.transpose(1, 2)


def convolution(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """A 3-D convolution without bias, in the 2-D form that is asked for where there is one.

    Args:
        x: (batch, channels, frames, height, width), channels-last.
        weight: (outputs, channels, frames, height, width).
    """
    time, *space = weight.shape[2:]
    stride, padding, one = tuple(stride), tuple(padding), list(weight.shape[2:]) == [1, 1, 1]
    if one and stride == (1, 1, 1) and ACTIVE.pointwise == "linear":
        mixed: Tensor = F.linear(x.movedim(1, -1), weight.flatten(1))
        return mixed.movedim(-1, 1)
    if time == 1 and stride[0] == 1 and (ACTIVE.pointwise != "plain" if one else ACTIVE.spatial):
        flat = F.conv2d(frames_apart(x), weight.squeeze(2), stride=stride[1:], padding=padding[1:])
        return frames_joined(flat, len(x))
    if ACTIVE.temporal and space == [1, 1] and stride[1:] == (1, 1) and not one:
        flat = F.conv2d(x.flatten(3), weight.flatten(3), stride=(stride[0], 1), padding=(padding[0], 0))
        return flat.view(*flat.shape[:3], *x.shape[3:])
    return F.conv3d(x, weight, None, stride, padding)


def pool(x: Tensor) -> Tensor:
    """Halves height and width, as the stem's MaxPool3d."""
    if x.is_cuda and ACTIVE.kernels and x.dtype != torch.float64 and (kernels := _stem_kernels()) is not None:
        return frames_joined(kernels.Pool.apply(frames_apart(x)), len(x))
    return frames_joined(F.max_pool2d(frames_apart(x), 3, 2, 1), len(x))


def stem_convolution(pixels: Tensor, weight: Tensor) -> Tensor:
    """The stem's convolution, of stride 2 in all directions, as a 2-D one of stride 1.

    Three input channels fill an eighth of what matrix units work on. Here, the channels of an output's frame are all
    input frames that it sees, times 2 x 2 pixels, times 3 colours: 60 for 5 frames, filled up to 64; and the kernel
    over these squares has half the extent, (7 + 1) / 2.

    Args:
        pixels: (batch, 3, frames, height, width), uint8 or normalised floats; height and width even.
        weight: (outputs, 3, k, n, n), k and n odd.

    Returns:
        (batch, outputs, frames / 2, height / 2, width / 2), channels-last.
    """
    autocast = torch.is_autocast_enabled(pixels.device.type)
    dtype = torch.get_autocast_dtype(pixels.device.type) if autocast else weight.dtype
    _, colours, taps, extent, _ = weight.shape
    centre, before = extent // 2, (extent // 2) % 2  # zeros before the kernel, so that it starts at an even pixel
    after = (extent + before) % 2
    size, left = (extent + before + after) // 2, (centre + before) // 2
    used = taps * 4 * colours
    channels = -(-used // 8) * 8 if used < 48 else -(-used // 64) * 64
    if pixels.dtype != torch.uint8:
        seen = _seen(pixels.to(dtype), taps, left, size, channels)
    elif pixels.is_cuda and ACTIVE.kernels and dtype != torch.float64 and (kernels := _stem_kernels()) is not None:
        seen = kernels.packed(pixels, taps, left, size, channels, dtype)
    else:
        seen = _seen(normalized(pixels).to(dtype), taps, left, size, channels)
    kernel = F.pad(weight.to(dtype), (before, after, before, after)).unflatten(4, (-1, 2)).unflatten(3, (-1, 2))
    kernel = kernel.permute(0, 3, 5, 2, 4, 6, 1).flatten(3)  # (outputs, size, size, taps * 4 * colours)
    kernel = F.pad(kernel, (0, channels - used)).permute(0, 3, 1, 2)
    flat = F.conv2d(seen.flatten(0, 1).permute(0, 3, 1, 2), kernel)
    return frames_joined(flat, len(pixels))


def _seen(pixels: Tensor, taps: int, left: int, size: int, channels: int) -> Tensor:
    """What every output sees, (batch, frames / 2, height / 2 + size - 1, width / 2 + size - 1, channels)."""
    _, colours, frames, height, width = pixels.shape
    squares = pixels.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))  # (batch, 3, frames, height / 2, 2, width / 2, 2)
    squares = squares.permute(0, 2, 3, 5, 4, 6, 1).flatten(4)  # (batch, frames, height / 2, width / 2, 12)
    steps, high, wide = (frames + 1) // 2, height // 2, width // 2
    seen: Tensor = squares.new_zeros(len(pixels), steps, high + size - 1, wide + size - 1, channels)
    for tap in range(taps):
        shift = tap - taps // 2
        first = max(0, (1 - shift) // 2)
        last = min(steps, (frames - 1 - shift) // 2 + 1)
        seen[:, first:last, left:left + high, left:left + wide, tap * 4 * colours:(tap + 1) * 4 * colours] = (
            squares[:, 2 * first + shift:2 * last + shift - 1:2])
    return seen


def normalized(pixels: Tensor) -> Tensor:
    """uint8 pixels to floats of about zero mean and unit deviation; floats have been normalised before."""
    return pixels.float().div_(255).sub_(0.45).div_(0.225) if pixels.dtype == torch.uint8 else pixels


def norm_is_fused(x: Tensor, norm: _BatchNorm) -> bool:
    """Whether `fused_norm` can take the place of this module and what follows it."""
    return (x.is_cuda and ACTIVE.norm and norm.training and norm.momentum is not None and x.dtype != torch.float64
            and x.numel() > 0 and _norm_kernels() is not None)


def fused_norm(x: Tensor, norm: _BatchNorm, shortcut: Tensor | None, relu: bool, fork: bool = False) -> Any:
    """relu(norm(x) + shortcut), in training; the ReLU and the shortcut only where they are asked for.

    Args:
        x, shortcut: (batch, channels, ...).
        norm: its running statistics move as when it is called.
        fork: the map is returned twice, for two uses.
    """
    kernels = _norm_kernels()
    x = kernels.laid_out(x)

    def measured_over_ranks() -> Tensor:
        mean, unbiased = torch.zeros(2, x.shape[1], device=x.device)
        kernels.factors(x, norm.weight, norm.bias, mean, unbiased, 1.0, norm.eps)  # as if these were running statistics
        count = x.numel() // x.shape[1]
        mean, inverse, of_all = moved(norm, mean, unbiased * max(1, count - 1), count)
        scale = norm.weight * inverse
        return torch.stack((scale, norm.bias - mean * scale, mean, inverse, of_all))

    def measured() -> Tensor:
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        factors: Tensor = kernels.factors(x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.momentum,
                                          norm.eps)
        return factors

    found = kept(norm, measured_over_ranks if is_over_ranks(norm) else measured)
    y = kernels.FusedNorm.apply(x, None if shortcut is None else kernels.laid_out(shortcut), norm.weight, norm.bias,
                                found[:4], found[4] if len(found) > 4 else None, relu, fork and ACTIVE.fork)
    return (y, y) if fork and not ACTIVE.fork else y


@lru_cache(maxsize=1)
def _norm_kernels() -> Any:
    """The module of Triton kernels; None where Triton is not installed."""
    try:
        from avtrain.models import norm_kernels
    except ImportError:
        return None
    return norm_kernels


@lru_cache(maxsize=1)
def _stem_kernels() -> Any:
    """As `_norm_kernels`."""
    try:
        from avtrain.models import stem_kernels
    except ImportError:
        return None
    return stem_kernels
