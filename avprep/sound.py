"""Pieces of sound with time stamps -> one waveform on the clip's time line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Time stamps that differ by less than this from the samples that came before are jitter (as ffmpeg's aresample has
# it), the first one by less than a millisecond.
_JITTER_S, _FIRST_JITTER_S = 0.1, 0.001
_SILENT_PEAK = 1e-4  # -80 dB: three steps of 16 bits
_CANCELLED_SHARE, _HEARD_PEAK = 0.05, 1e-3


@dataclass(frozen=True)
class Sound:
    """The sound of a clip.

    Attributes:
        waveform: (samples,) float32, the mean of the channels. Samples over 1 stay as they are (float files, AAC).
        starts_s: when the first piece begins; silence stands before it.
        filled_s: seconds of silence that were put in, at the start and where pieces are missing.
        silent: there is nothing to hear.
        cancels: the channels have sound that is lost in their mean, as in opposite phase.
    """

    waveform: NDArray[np.float32]
    starts_s: float
    filled_s: float
    silent: bool
    cancels: bool


def on_time_line(pieces: Iterable[tuple[int, NDArray[np.float32]]], first_sample: int, samples: int,
                 sample_rate_hz: int) -> Sound | None:
    """Put each piece where its time stamp says: silence into gaps, overlaps left out; nothing is ever stretched.

    Args:
        pieces: (sample number of the first, (samples, 2) float32: the mean of the channels, and another weighting of
            them, which tells silence from sound that cancels).
        first_sample: the clip begins here, on the pieces' time line.
        samples: of the whole clip; what is later is left out.
        sample_rate_hz: of the pieces.

    Returns:
        The sound up to the last piece's end; None if no piece lies in the clip.
    """
    there: list[NDArray[np.float32]] = []
    at, starts, filled = 0, None, 0
    for number, piece in pieces:
        jitter = round((_JITTER_S if there else _FIRST_JITTER_S) * sample_rate_hz)
        if abs(number - at) > jitter:
            if number > at:
                there.append(np.zeros((number - at, 2), np.float32))
                filled += max(0, number - max(at, first_sample))
                at = number
            else:
                piece = piece[at - number:]
        if starts is None and at + len(piece) > first_sample:
            starts = max(at, first_sample)
        there.append(piece)
        at += len(piece)
        if at >= first_sample + samples:
            break
    if starts is None:
        return None
    mixes = np.concatenate(there)[first_sample:first_sample + samples]
    if not len(mixes):
        return None
    waveform = np.ascontiguousarray(mixes[:, 0])
    peak, other_peak = (float(np.abs(mix).max()) for mix in mixes.T)
    cancels = other_peak >= _HEARD_PEAK and peak < _CANCELLED_SHARE * other_peak
    return Sound(waveform, (starts - first_sample) / sample_rate_hz, filled / sample_rate_hz,
                 peak < _SILENT_PEAK and not cancels, cancels)
