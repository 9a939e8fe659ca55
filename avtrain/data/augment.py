"""Views of a clip: where to crop, whether to flip, what to mask; and pixels from planes. One view for a whole clip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from avtrain.data.decode import Planes

# Limited-range YUV to RGB in 0..255: rows R, G, B of the factors of Y - 16, U - 128, V - 128.
_BT601 = ((1.164384, 0.0, 1.596027), (1.164384, -0.391762, -0.812968), (1.164384, 2.017232, 0.0))
_BT709 = ((1.164384, 0.0, 1.792741), (1.164384, -0.213249, -0.532909), (1.164384, 2.112402, 0.0))

_FRAMES_AT_ONCE = 8  # all that is made of them on the way stays in the processor's cache


@dataclass(frozen=True)
class View:
    """A square of the picture, in parts of its short side, scaled to `crop` pixels.

    Attributes:
        size: side of the square, in short sides, at most 1.
        down, across: where it lies in what is left of height and width, 0 to 1.
        flip: mirrored left to right.
    """

    size: float
    down: float
    across: float
    flip: bool


def random_view(crop: int, scale: tuple[int, ...], random: Generator) -> View:
    """Short side scaled to a length drawn from `scale`, a `crop` square anywhere, flipped half the time."""
    short_side = float(random.uniform(scale[0], scale[1]))
    return View(min(1.0, crop / short_side), random.uniform(), random.uniform(), bool(random.random() < 0.5))


def centre_view(crop: int, scale: tuple[int, ...]) -> View:
    """The view of evaluation: the lower end of `scale`, the centre."""
    return View(min(1.0, crop / scale[0]), 0.5, 0.5, False)


def pixels(planes: Planes, view: View, crop: int) -> Tensor:
    """Crop and resize the planes, then convert: far fewer pixels to convert than in the whole frames.

    Returns:
        (frames, 3, crop, crop) uint8 RGB.
    """
    rgb = torch.empty(len(planes.luma), 3, crop, crop, dtype=torch.uint8)
    matrix = _BT709 if planes.bt709 else _BT601
    for start in range(0, len(rgb), _FRAMES_AT_ONCE):
        part = slice(start, start + _FRAMES_AT_ONCE)
        _convert(torch.from_numpy(planes.luma[part]), torch.from_numpy(planes.chroma[part]), view, matrix, rgb[part])
    return rgb


def _convert(luma: Tensor, chroma: Tensor, view: View, matrix: tuple[tuple[float, ...], ...], rgb: Tensor) -> None:
    """A few frames' planes into `rgb`."""
    crop, (height, width) = rgb.shape[-1], luma.shape[1:]
    side = view.size * min(height, width)
    top, left = view.down * (height - side), view.across * (width - side)
    y = _resized(luma, top, left, side, crop).float().mul_(matrix[0][0]).add_(0.5 - 16 * matrix[0][0])
    u, v = _resized(chroma.flatten(0, 1), top / 2, left / 2, side / 2, crop).float().sub_(128).unflatten(0, (-1, 2)
                                                                                                        ).unbind(1)
    exact = torch.empty(rgb.shape)
    torch.add(y, v, alpha=matrix[0][2], out=exact[:, 0])
    torch.add(y, u, alpha=matrix[1][1], out=exact[:, 1]).add_(v, alpha=matrix[1][2])
    torch.add(y, u, alpha=matrix[2][1], out=exact[:, 2])
    # The half in y makes cutting off rounding. By way of int16: torch turns floats into bytes one by one, but into
    # int16, and that into bytes, many at a time.
    whole = exact.short().clamp_(0, 255)
    rgb.copy_(whole.flip(-1) if view.flip else whole)


def _resized(planes: Tensor, top: float, left: float, side: float, crop: int) -> Tensor:
    """(planes, height, width) uint8 -> (planes, crop, crop): the square cut out, antialiased."""
    first_row, first_column = round(top), round(left)
    rows = min(max(1, round(side)), planes.shape[1] - first_row)
    columns = min(max(1, round(side)), planes.shape[2] - first_column)
    square = planes[:, first_row:first_row + rows, first_column:first_column + columns]
    # As four channels of fewer pictures: torch resizes four in the time of one.
    lacking = -len(square) % 4
    if lacking:
        square = torch.cat((square, square[-1:].expand(lacking, -1, -1)))
    fours = F.interpolate(square.contiguous().unflatten(0, (-1, 4)), (crop, crop), mode="bilinear", antialias=True,
                          align_corners=False)
    return fours.flatten(0, 1)[:len(planes)]


def masked_log_mel(segments: NDArray[np.float32], frequency_share: float, time_share: float,
                   random: Generator) -> NDArray[np.float32]:
    """In every segment, set one band of frequencies and one stretch of time to the segment's mean.

    Each is at most that share of its axis, and drawn anew for every segment: one mask for a whole clip would be a mark
    by which masked prediction knows the clip, and learns nothing else (seen on the demo: a training loss of 1.8 beside
    a held-out one of 3.6).

    Args:
        segments: (segments, mels, frames).
    """
    masked: NDArray[np.float32] = segments.copy()
    for segment in masked:
        mean = segment.mean()
        for lines, share in ((segment, frequency_share), (segment.T, time_share)):
            size = int(random.integers(0, int(share * len(lines)) + 1))
            start = int(random.integers(0, len(lines) - size + 1))
            lines[start:start + size] = mean
    return masked
