"""A visual stem's input and its pooling in one pass each: kernels for CUDA, in Triton. Maps lie channels-last."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 1024  # elements of a program


@triton.jit
def _pack(pixels, seen, FRAMES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, COLOURS: tl.constexpr,
          TAPS: tl.constexpr, STEPS: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, LEFT: tl.constexpr,
          CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """seen (batch, STEPS, HIGH, WIDE, CHANNELS): what an output sees of pixels (batch, COLOURS, FRAMES, HEIGHT, WIDTH).

    A channel is (tap, row of 2, column of 2, colour).
    """
    line = tl.program_id(0)
    i = line % HIGH
    step = line // HIGH % STEPS
    batch = (line // (HIGH * STEPS)).to(tl.int64)
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = within // CHANNELS
    channel = within % CHANNELS
    tap = channel // (4 * COLOURS)
    frame = 2 * step + tap - TAPS // 2
    y = 2 * (i - LEFT) + channel // (2 * COLOURS) % 2
    x = 2 * (j - LEFT) + channel // COLOURS % 2
    there = (j < WIDE) & (tap < TAPS) & (frame >= 0) & (frame < FRAMES)
    there = there & (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
    image = pixels + batch * (COLOURS * FRAMES * HEIGHT * WIDTH)
    source = (channel % COLOURS * FRAMES + frame) * (HEIGHT * WIDTH) + y * WIDTH + x
    value = tl.load(image + source, mask=there, other=0).to(tl.float32)
    value = tl.where(there, (value / 255.0 - 0.45) / 0.225, 0.0)
    row = seen + line.to(tl.int64) * (WIDE * CHANNELS)
    tl.store(row + within, value.to(seen.dtype.element_ty), mask=j < WIDE)


def packed(pixels: Tensor, taps: int, left: int, size: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Normalised squares of 2 x 2 pixels of `taps` frames, zeros around: the input of a stem of stride 1.

    Args:
        pixels: (batch, colours, frames, height, width), uint8.
        left: squares of zeros before the picture.
        size: extent of the kernel over squares.
        channels: of the result, at least taps * 4 * colours.

    Returns:
        (batch, frames / 2, height / 2 + size - 1, width / 2 + size - 1, channels).
    """
    batch, colours, frames, height, width = pixels.shape
    steps, high, wide = (frames + 1) // 2, height // 2 + size - 1, width // 2 + size - 1
    seen = torch.empty(batch, steps, high, wide, channels, dtype=dtype, device=pixels.device)
    _pack[(batch * steps * high, triton.cdiv(wide * channels, _BLOCK))](
        pixels.contiguous(), seen, FRAMES=frames, HEIGHT=height, WIDTH=width, COLOURS=colours, TAPS=taps,
        STEPS=steps, HIGH=high, WIDE=wide, LEFT=left, CHANNELS=channels, BLOCK=_BLOCK)
    return seen


@triton.jit
def _pool(x, y, chosen, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
          CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest of 3 x 3 places at a stride of 2, and which of the nine it is (the first one)."""
    line = tl.program_id(0)
    image = x + (line // HIGH).to(tl.int64) * (HEIGHT * WIDTH * CHANNELS)
    i = line % HIGH
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = within // CHANNELS
    channel = within % CHANNELS
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    which = tl.zeros((BLOCK,), tl.int32)
    for tap in tl.static_range(9):
        row = 2 * i + tap // 3 - 1
        column = 2 * j + tap % 3 - 1
        there = (j < WIDE) & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
        source = image + (row * WIDTH + column) * CHANNELS + channel
        value = tl.load(source, mask=there, other=float("-inf")).to(tl.float32)
        more = (value > best) | (value != value)
        which = tl.where(more, tap, which)
        best = tl.where(more, value, best)
    at = line.to(tl.int64) * (WIDE * CHANNELS) + within
    tl.store(y + at, best.to(y.dtype.element_ty), mask=j < WIDE)
    tl.store(chosen + at, which.to(tl.uint8), mask=j < WIDE)


@triton.jit
def _unpool(gradient, chosen, of_x, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, HIGH: tl.constexpr,
            WIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of x: of the windows that a place is in, at most four, those that chose it."""
    line = tl.program_id(0)
    image = (line // HEIGHT).to(tl.int64) * (HIGH * WIDE * CHANNELS)
    row = line % HEIGHT
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = within // CHANNELS
    channel = within % CHANNELS
    total = tl.zeros((BLOCK,), tl.float32)
    for window in tl.static_range(4):
        i = row // 2 + window // 2
        j = column // 2 + window % 2
        tap = (row - 2 * i + 1) * 3 + column - 2 * j + 1
        there = (column < WIDTH) & (i < HIGH) & (j < WIDE)
        there = there & (row - 2 * i + 1 >= 0) & (column - 2 * j + 1 >= 0)
        source = (i * WIDE + j) * CHANNELS + channel
        which = tl.load(chosen + image + source, mask=there, other=255).to(tl.int32)
        value = tl.load(gradient + image + source, mask=there, other=0.0).to(tl.float32)
        total += tl.where(there & (which == tap), value, 0.0)
    at = line.to(tl.int64) * (WIDTH * CHANNELS) + within
    tl.store(of_x + at, total.to(of_x.dtype.element_ty), mask=column < WIDTH)


class Pool(torch.autograd.Function):
    """Max pooling of 3 x 3 places at a stride of 2, one place of padding: x (images, channels, height, width)."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        images, channels, height, width = x.shape
        high, wide = (height + 1) // 2, (width + 1) // 2
        y = torch.empty(images, channels, high, wide, dtype=x.dtype, device=x.device,
                        memory_format=torch.channels_last)
        chosen = torch.empty_like(y, dtype=torch.uint8)
        context.sizes = {"HEIGHT": height, "WIDTH": width, "HIGH": high, "WIDE": wide, "CHANNELS": channels,
                         "BLOCK": _BLOCK}
        _pool[(images * high, triton.cdiv(wide * channels, _BLOCK))](x, y, chosen, **context.sizes)
        context.save_for_backward(chosen)
        return y

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        chosen, = context.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        images, channels, height, width = len(chosen), *(context.sizes[name] for name in ("CHANNELS", "HEIGHT",
                                                                                          "WIDTH"))
        of_x = torch.empty(images, channels, height, width, dtype=gradient.dtype, device=gradient.device,
                           memory_format=torch.channels_last)
        _unpool[(images * height, triton.cdiv(width * channels, _BLOCK))](gradient, chosen, of_x, **context.sizes)
        return of_x
