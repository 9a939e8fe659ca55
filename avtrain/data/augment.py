"""Views of a clip: where to crop, whether to flip, what to mask; and pixels from planes. One view for a whole clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from avtrain.data.convert import pack, rgb_factors, to_rgb
from avtrain.data.decode import Planes

_FRAMES_AT_ONCE = 16  # all that is made of them on the way stays in the processor's cache
# Two by two pixels share a sample of chroma (a quarter of the work) unless the square is larger than this many crops:
# it then has so many samples itself that colours at edges would be off.
_SHARED_CHROMA = 1.4
_EQUALIZER_POINTS = 6
_NOISE_SHAPE = 4  # of the gamma distribution of noise power in a mel band, which averages a few lines of the spectrum


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


def pixels(planes: Planes, view: View, rgb: Tensor) -> None:
    """Crop and resize the planes, then convert: far fewer pixels to convert than in the whole frames.

    Args:
        rgb: (3, frames, crop, crop) uint8, filled with as many frames as the planes have.
    """
    factors = rgb_factors(planes.bt709)
    for start in range(0, len(planes.luma), _FRAMES_AT_ONCE):
        part = slice(start, start + _FRAMES_AT_ONCE)
        _convert(planes.luma[part], planes.chroma[part], view, factors, rgb[:, part].numpy())


def _convert(luma: NDArray[np.uint8], chroma: NDArray[np.uint8], view: View, factors: NDArray[np.int32],
             rgb: NDArray[np.uint8]) -> None:
    """A few frames' planes into the first frames of `rgb`, (3, frames, crop, crop)."""
    crop, (height, width) = rgb.shape[-1], luma.shape[1:]
    side = view.size * min(height, width)
    top, left = view.down * (height - side), view.across * (width - side)
    y = _resized(luma, top, left, side, crop, view.flip)
    samples = (crop + 1) // 2 if side <= _SHARED_CHROMA * crop else crop
    uv = _resized(chroma.reshape(-1, *chroma.shape[2:]), top / 2, left / 2, side / 2, samples, view.flip)
    to_rgb(y, uv, factors, rgb[:, :len(luma)])


def _resized(planes: NDArray[np.uint8], top: float, left: float, side: float, crop: int,
             flip: bool) -> NDArray[np.uint32]:
    """(planes, height, width) -> (planes / 4, crop, crop), packed: the square cut out, antialiased, maybe mirrored."""
    first_row, first_column = round(top), round(left)
    rows = min(max(1, round(side)), planes.shape[1] - first_row)
    columns = min(max(1, round(side)), planes.shape[2] - first_column)
    packed = np.empty((-(-len(planes) // 4), rows, columns, 1), np.uint32)
    pack(planes[:, first_row:first_row + rows, first_column:first_column + columns], flip, packed[..., 0])
    # As four channels, the last dimension of memory: torch resizes four in a third of the time of one.
    channels = torch.from_numpy(packed.view(np.uint8)).permute(0, 3, 1, 2)
    fours = F.interpolate(channels, (crop, crop), mode="bilinear", antialias=True, align_corners=False)
    return fours.permute(0, 2, 3, 1).contiguous().numpy().view(np.uint32)[..., 0]


class SoundAugmentation(NamedTuple):
    """What happens to log-mel segments in training; see `another_recording` and `masked_log_mel`."""

    equalizer: float = 0.0
    noise: tuple[float, ...] = ()
    frequency_shift: int = 0
    frequency_mask: float = 0.0
    time_mask: float = 0.0


def augmented_log_mel(segments: NDArray[np.float32], how: SoundAugmentation, random: Generator) -> NDArray[np.float32]:
    """(segments, mels, frames) -> the same: recorded elsewhere, then masked, every segment by itself."""
    recorded = another_recording(segments, how.equalizer, how.noise, how.frequency_shift, random)
    return masked_log_mel(recorded, how.frequency_mask, how.time_mask, random)


def another_recording(segments: NDArray[np.float32], equalizer: float, noise: tuple[float, ...], frequency_shift: int,
                      random: Generator) -> NDArray[np.float32]:
    """Every segment as if it had been recorded somewhere else: shifted, filtered, louder or quieter, noisy.

    Anew for every segment: microphone, room and noise floor, the same all through a real recording, then don't tell
    masked prediction which clip a segment is from.

    Args:
        segments: (segments, mels, frames) log-mel, in nats.
        equalizer: standard deviation, in nats, of the gain at each of six points along the bands (between them it is
            interpolated), and of another gain for all bands.
        noise: (quietest, loudest) mean log-mel of the noise that is added, in nats; its slope from the lowest to the
            highest band has a standard deviation of 2. Empty: none.
        frequency_shift: most bands up or down; the outermost band fills what is left free.
    """
    if not (equalizer or noise or frequency_shift):
        return segments
    mels, frames = segments.shape[1:]
    along = np.linspace(-1, 1, mels)
    varied = np.empty_like(segments)
    for segment, result in zip(segments, varied, strict=True):
        shift = int(random.integers(-frequency_shift, frequency_shift + 1))
        gains = random.normal(0, equalizer) + np.interp(along, np.linspace(-1, 1, _EQUALIZER_POINTS),
                                                        random.normal(0, equalizer, _EQUALIZER_POINTS))
        result[:] = segment[np.clip(np.arange(mels) - shift, 0, mels - 1)] + gains[:, None]
        if noise:
            level = random.uniform(noise[0], noise[1]) + random.normal() * along
            added = level[:, None] + np.log(random.gamma(_NOISE_SHAPE, 1 / _NOISE_SHAPE, (mels, frames)))
            result[:] = np.logaddexp(result, added)
    return varied


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
