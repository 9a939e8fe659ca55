"""Loops over pixels, compiled: four planes packed into one picture to be resized, and RGB made of packed planes.

As array operations the same took three times as long: a dozen passes over memory, where one does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

# Limited-range YUV to RGB in 0..255: factors of V in R, of U and V in G, of U in B; that of Y is the same for all.
_BT601 = (1.596027, -0.391762, -0.812968, 2.017232)
_BT709 = (1.792741, -0.213249, -0.532909, 2.112402)
_LUMA = 255 / 219
_FRACTION_BITS = 16

_Function = TypeVar("_Function", bound=Callable[..., Any])


def rgb_factors(bt709: bool) -> NDArray[np.int32]:
    """What `to_rgb` takes: the factor of Y, the four of U and V, and what is added to R, G, B, times 2 ** 16."""
    red_v, green_u, green_v, blue_u = _BT709 if bt709 else _BT601
    half = 0.5  # makes cutting off rounding
    added = [half - 16 * _LUMA - 128 * chroma for chroma in (red_v, green_u + green_v, blue_u)]
    exact = np.array([_LUMA, red_v, green_u, green_v, blue_u, *added])
    return np.asarray(np.round(exact * 2 ** _FRACTION_BITS), np.int32)


def _compiled(signature: str | None = None) -> Callable[[_Function], _Function]:
    """Compiled once a machine, if there is a folder for numba's cache.

    With a signature, the loops are there on import (0.3 s from the cache), for worker processes to be forked from; and
    its ::1, memory without gaps, is what lets the compiler work on many pixels at a time.
    """
    def decorated(function: _Function) -> _Function:
        try:
            return cast(_Function, njit(signature, cache=True)(function))
        except RuntimeError:  # neither the package's folder nor the user's can be written to
            return cast(_Function, njit(signature)(function))
    return decorated


@_compiled("void(uint8[:, :, :], boolean, uint32[:, :, ::1])")
def pack(planes: NDArray[np.uint8], flip: bool, packed: NDArray[np.uint32]) -> None:
    """Plane p into byte p % 4, lowest first, of picture p // 4, maybe mirrored; where one is lacking, the last plane.

    Args:
        planes: (planes, height, width).
        packed: (planes / 4, height, width), filled.
    """
    last, height, width = planes.shape[0] - 1, planes.shape[1], planes.shape[2]
    for picture in range(len(packed)):
        for row in range(height):
            first, out = planes[4 * picture, row], packed[picture, row]
            second = planes[min(4 * picture + 1, last), row]
            third = planes[min(4 * picture + 2, last), row]
            fourth = planes[min(4 * picture + 3, last), row]
            for column in range(width):
                four = (np.uint32(first[column]) | np.uint32(second[column]) << np.uint32(8)
                        | np.uint32(third[column]) << np.uint32(16) | np.uint32(fourth[column]) << np.uint32(24))
                out[width - 1 - column if flip else column] = four


@_compiled()
def _unpacked(packed: Any, plane: Any) -> Any:
    """The plane's byte, as 32 bits: numba would make sums of 64, half as many at a time."""
    return np.int32(packed >> np.uint32(8 * (plane % 4)) & np.uint32(255))


@_compiled()
def _whole(scaled: Any) -> Any:
    """A sum of `rgb_factors` x samples as a byte."""
    return np.uint8(min(max(scaled >> np.int32(_FRACTION_BITS), np.int32(0)), np.int32(255)))


@_compiled()
def _spread(packed: Any, plane: Any, share: Any, row: Any) -> None:
    """The plane's samples, each for one or two pixels of the row: one loop for both is slower."""
    if share == 1:
        for sample in range(len(packed)):
            row[sample] = _unpacked(packed[sample], plane)
    else:
        for sample in range(len(packed)):
            row[2 * sample] = row[2 * sample + 1] = _unpacked(packed[sample], plane)


@_compiled("void(uint32[:, :, ::1], uint32[:, :, ::1], int32[::1], uint8[:, :, :, :])")
def to_rgb(luma: NDArray[np.uint32], chroma: NDArray[np.uint32], factors: NDArray[np.int32],
           rgb: NDArray[np.uint8]) -> None:
    """RGB of packed planes.

    Args:
        luma: (frames / 4, crop, crop).
        chroma: (frames / 2, crop, crop), or crop / 2: two by two pixels then share a sample, as in players and
            decoders. Plane 2 f is U of frame f, plane 2 f + 1 its V.
        factors: of `rgb_factors`.
        rgb: (3, frames, crop, crop), filled.
    """
    frames, crop, samples = rgb.shape[1], rgb.shape[2], chroma.shape[2]
    share = 1 if samples == crop else 2
    u, v = np.empty(share * samples, np.int32), np.empty(share * samples, np.int32)
    for frame in range(frames):
        for row in range(crop):
            if row % share == 0:
                colour = chroma[frame // 2, row // share]
                _spread(colour, 2 * frame, share, u)
                _spread(colour, 2 * frame + 1, share, v)
            light = luma[frame // 4, row]
            red, green, blue = rgb[0, frame, row], rgb[1, frame, row], rgb[2, frame, row]
            for column in range(crop):
                y = factors[0] * _unpacked(light[column], frame)
                red[column] = _whole(y + factors[1] * v[column] + factors[5])
                green[column] = _whole(y + factors[2] * u[column] + factors[3] * v[column] + factors[6])
                blue[column] = _whole(y + factors[4] * u[column] + factors[7])
