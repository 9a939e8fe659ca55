"""Waveform -> log-mel spectrogram, on a grid in which every segment is a slice."""

from __future__ import annotations

import math
import re
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from avprep.spec import ClipSpec

_POWER_FLOOR = 1e-6
_NPY_HEADER = re.compile(rb"\x93NUMPY\x01\x00..\{'descr': '<f2', 'fortran_order': (?P<order>True|False), "
                         rb"'shape': \((?P<mels>\d{1,9}), (?P<frames>\d{1,9})\), \} *\n", re.DOTALL)


@lru_cache(maxsize=8)
def _mel_filters(sample_rate_hz: int, window_samples: int, mel_bands: int) -> NDArray[np.float32]:
    """HTK-scale triangles without area normalisation: (mel_bands, window_samples // 2 + 1)."""
    import librosa.filters  # seconds at first import: only where a log-mel is really computed

    filters: NDArray[np.float32] = librosa.filters.mel(
        sr=sample_rate_hz, n_fft=window_samples, n_mels=mel_bands, htk=True, norm=None)
    return filters


def frame_centres(samples: int, spec: ClipSpec) -> NDArray[np.int64]:
    """Sample positions of the log-mel frames of a waveform.

    Frame k of segment s is centred at s * w + k * hop, so frames [128 s, 128 (s + 1)) are segment s and start where
    its pictures start. Because 128 hops are a little longer than a segment, the step from one segment to the next
    is shorter than a hop (by 120 samples, 2.7 ms, for 2-s segments).
    """
    whole, rest = divmod(samples, spec.segment_samples)
    within = np.arange(spec.mel_frames) * spec.hop_samples
    starts = np.arange(whole + 1)[:, None] * spec.segment_samples
    frames_of_rest = min(spec.mel_frames, rest // spec.hop_samples + 1) if rest else 0
    return (starts + within).reshape(-1)[: whole * spec.mel_frames + frames_of_rest]


def stored_log_mel(npy: bytes) -> NDArray[np.float16]:
    """The log-mel of a sample's `.logmel.npy`.

    Raises:
        ValueError: it is no array of two dimensions of float16, or another size than its bytes.
    """
    # Not by numpy: its reader takes what the header asks for before it looks at what there is, and runs a parser on it.
    header = _NPY_HEADER.match(npy)
    if header is None:
        raise ValueError(f"its log-mel is no array of float16 in two dimensions, but {npy[:80]!r}")
    by_columns, *shape = header["order"] == b"True", int(header["mels"]), int(header["frames"])
    if 2 * math.prod(shape) != len(npy) - header.end():
        raise ValueError(f"its log-mel has {len(npy)} bytes for {shape[0]} x {shape[1]} values")
    return np.frombuffer(npy, np.float16, offset=header.end()).reshape(shape, order="F" if by_columns else "C")


def log_mel(waveform: NDArray[np.float32], spec: ClipSpec) -> NDArray[np.float32]:
    """The log-mel spectrogram of a mono waveform: log(1e-6 + mel power).

    Periodic Hann window of two hops, centred, reflect padding at the two ends of the waveform (inside it, a frame at
    a segment's edge sees the real neighbouring samples), power 2.

    Args:
        waveform: (samples,) float32 at `spec.sample_rate_hz`, at least one sample, all finite. Samples over 1, which
            float files and AAC may have, are taken as they are.
        spec: the clip's settings.

    Returns:
        (mel_bands, frames) float32; `mel_frames` frames for every whole segment, then those of the rest.
    """
    hop, window = spec.hop_samples, 2 * spec.hop_samples
    filters = _mel_filters(spec.sample_rate_hz, window, spec.mel_bands)
    # The periodic Hann window is the symmetric one of one sample more, without its last sample.
    taper = np.hanning(window + 1)[:-1].astype(np.float32)
    centres = frame_centres(len(waveform), spec)
    if len(waveform) <= hop:  # too short to reflect
        waveform = np.pad(waveform, (0, hop + 1 - len(waveform)))
    # The last frame of a segment reaches a little over its end; at the end of the sound, padding covers that.
    padded = np.pad(waveform, hop, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)
    power = np.empty((spec.mel_bands, len(centres)), np.float32)
    for first in range(0, len(centres), spec.mel_frames):  # a segment at a time stays in the processor's cache
        part = slice(first, first + spec.mel_frames)
        spectrum = np.fft.rfft(windows[centres[part]] * taper, axis=1)
        power[:, part] = filters @ (spectrum.real**2 + spectrum.imag**2).T
    logarithm: NDArray[np.float32] = np.log(power + np.float32(_POWER_FLOOR))
    return logarithm
