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
    height, width = planes.luma.shape[1:]
    side = view.size * min(height, width)
    top, left = view.down * (height - side), view.across * (width - side)
    luma = _resized(torch.from_numpy(planes.luma)[:, None], top, left, side, crop)
    chroma = _resized(torch.from_numpy(planes.chroma), top / 2, left / 2, side / 2, crop)
    yuv = torch.cat((luma, chroma), 1).float()
    matrix = torch.tensor(_BT709 if planes.bt709 else _BT601)
    offset = matrix @ torch.tensor([16.0, 128.0, 128.0])
    rgb = torch.baddbmm(-offset[:, None], matrix.expand(len(yuv), 3, 3), yuv.flatten(2)).unflatten(2, (crop, crop))
    whole: Tensor = rgb.round_().clamp_(0, 255).byte()
    return whole.flip(-1) if view.flip else whole


def _resized(plane: Tensor, top: float, left: float, side: float, crop: int) -> Tensor:
    """(frames, channels, height, width) uint8, the square cut out and antialiased to crop x crop."""
    first_row, first_column = round(top), round(left)
    rows = min(max(1, round(side)), plane.shape[2] - first_row)
    columns = min(max(1, round(side)), plane.shape[3] - first_column)
    square = plane[:, :, first_row:first_row + rows, first_column:first_column + columns]
    return F.interpolate(square, (crop, crop), mode="bilinear", antialias=True, align_corners=False)


def masked_log_mel(segments: NDArray[np.float32], frequency_share: float, time_share: float,
                   random: Generator) -> NDArray[np.float32]:
    """Set one band of frequencies and one stretch of time to the clip's mean, each at most that share of the axis.

    Args:
        segments: (segments, mels, frames).
    """
    masked: NDArray[np.float32] = segments.copy()
    mean = segments.mean()
    for axis, share in ((1, frequency_share), (2, time_share)):
        length = segments.shape[axis]
        size = int(random.integers(0, int(share * length) + 1))
        start = int(random.integers(0, length - size + 1))
        window = [slice(None), slice(None), slice(None)]
        window[axis] = slice(start, start + size)
        masked[tuple(window)] = mean
    return masked
