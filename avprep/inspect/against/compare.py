"""A stored clip against what its source has there: the problems, in words."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator

import av
import numpy as np
from numpy.typing import NDArray

from avprep.inspect.against.source import PICTURE_SEARCH_S, SOUND_SEARCH_S, Around, thumbnail
from avprep.logmel import log_mel, stored_log_mel

_TOLERANCE_S, _LENGTH_TOLERANCE_S = 0.1, 0.3
_FRAMES_APART = 8
# Differences of grey levels (0 to 255, root mean square). Another place is right only if it is clearly better; and
# a picture is the source's unless it differs by most of its own contrast.
_GREY_NOISE, _CLEARLY_WORSE = 2.0, 1.5
_OTHER_GREY, _OTHER_CONTRAST = 10.0, 0.8
# The same for log-mels (mean absolute difference but for the level), compared in parts of a few seconds.
_PART_S, _SHORTEST_PART_FRAMES, _EDGE_FRAMES = 4.0, 16, 2
_MEL_NOISE, _OTHER_MEL, _LEVEL_TOLERANCE = 0.1, 0.6, 0.1
_FLOOR = 1e-6  # of the log-mel's power
_AUDIBLE, _AUDIBLE_SHARE = math.log(_FLOOR) + 2, 0.01
_RIGHT = 4  # the rank of what has no problem


def picture_problems(around: Around, mp4: bytes) -> Iterator[str]:
    stored = _stored_pictures(mp4)
    if not around.pictures:  # in a long pause the last picture stays, from before what was looked at
        return
    begins = any(time_s < around.end_s for time_s, _ in around.pictures)
    there_s = min(around.end_s, around.picture_ends_s) - around.start_s if begins else 0.0
    pictures = sorted(around.pictures, key=lambda picture: picture[0])
    times_s = np.array([time_s for time_s, _ in pictures])
    step_s = float(np.median(np.diff(times_s))) if len(times_s) > 1 else 0.0
    yield from _length_problem("picture", len(stored) / around.spec.fps, there_s, step_s)
    if not stored:
        return
    greys = np.array([grey for _, grey in pictures], np.float32)
    before_s, after_s = np.append(-np.inf, times_s[:-1]), np.append(times_s[1:], np.inf)
    elsewhere = None
    for number in sorted({*range(0, len(stored), _FRAMES_APART), len(stored) - 1}):
        at_s = number / around.spec.fps
        due_s, slack_s = around.start_s + at_s, max(_TOLERANCE_S, 1 / around.spec.fps)
        # A picture is shown until the next one comes, and may come one step early.
        near = (after_s >= due_s - slack_s) & (before_s <= due_s + slack_s)
        far = (after_s >= due_s - PICTURE_SEARCH_S) & (times_s <= due_s + PICTURE_SEARCH_S)
        different = np.full(len(times_s), np.inf)
        tried = near | far
        different[tried] = np.sqrt(np.square(greys[tried] - stored[number]).mean(axis=(1, 2)))
        nearest, best = different[near].min(), int(different.argmin())
        other = max(_OTHER_GREY, _OTHER_CONTRAST * stored[number].std())
        if nearest > _GREY_NOISE + _CLEARLY_WORSE * different[best] and different[best] <= other:
            yield f"its picture at {at_s:.1f} s is that of {_shift(times_s[best] - due_s)}"
            return
        if nearest > other and elsewhere is None:
            elsewhere = f"its picture at {at_s:.1f} s is none of those within {PICTURE_SEARCH_S:g} s there"
    if elsewhere:
        yield elsewhere


def _shift(shift_s: float) -> str:
    return f"{abs(shift_s):.2f} s {'later' if shift_s > 0 else 'earlier'}"


def _length_problem(what: str, stored_s: float, there_s: float, step_s: float = 0.0) -> Iterator[str]:
    there_s = max(0.0, there_s)
    if abs(stored_s - there_s) > _LENGTH_TOLERANCE_S + step_s:
        yield f"it has {stored_s:.2f} s of {what} where its source has {there_s:.2f} s"


def _stored_pictures(mp4: bytes) -> list[NDArray[np.uint8]]:
    if not mp4:
        return []
    try:
        with av.open(io.BytesIO(mp4), "r", format="mp4", metadata_errors="replace") as container:
            return [thumbnail(frame) for frame in container.decode(video=0)]
    except av.error.FFmpegError:  # named by `verify`
        return []


def sound_problems(around: Around, npy: bytes) -> Iterator[str]:
    spec, stored = around.spec, _stored_log_mel(npy, around.spec.mel_bands)
    segments, rest = divmod(stored.shape[1], spec.mel_frames)
    stored_s = segments * spec.segment_s + rest * spec.hop_samples / spec.sample_rate_hz
    begins = any(at < around.end_s * spec.sample_rate_hz and at + len(piece) > around.start_s * spec.sample_rate_hz
                 for at, piece in around.pieces)
    there_s = min(around.end_s, around.sound_ends_s) - around.start_s if begins else 0.0
    yield from _length_problem("sound", stored_s, there_s)
    if not stored.shape[1] or not around.pieces:
        return
    lead = math.ceil(SOUND_SEARCH_S / spec.segment_s)  # whole segments keep the log-mel's frames where the clip's are
    first = round(around.start_s * spec.sample_rate_hz) - lead * spec.segment_samples
    source = log_mel(_waveform(around, first, (segments + 2 * lead + 2) * spec.segment_samples), spec)
    frame_s, ends = spec.hop_samples / spec.sample_rate_hz, stored.shape[1] - _EDGE_FRAMES
    length = round(_PART_S / frame_s)
    found = []
    for start in range(_EDGE_FRAMES, ends, length):  # the first frame and the last see no neighbours
        part = stored[:, start : min(start + length, ends)]
        if part.shape[1] >= min(_SHORTEST_PART_FRAMES, ends - _EDGE_FRAMES):
            rank, problem = _part_problem(part, source, lead * spec.mel_frames + start, frame_s)
            found.append((rank, f"its sound from {start * frame_s:.1f} s on {problem}"))
    rank, problem = min(found, key=lambda ranked: ranked[0], default=(_RIGHT, ""))
    if rank < _RIGHT:
        yield problem


def _stored_log_mel(npy: bytes, mel_bands: int) -> NDArray[np.float32]:
    try:
        stored: NDArray[np.float32] = stored_log_mel(npy).astype(np.float32)
    except (EOFError, ValueError):  # absent, or named by `verify`
        stored = np.empty((mel_bands, 0), np.float32)
    return stored if stored.ndim == 2 and len(stored) == mel_bands else np.empty((mel_bands, 0), np.float32)


def _part_problem(part: NDArray[np.float32], source: NDArray[np.float32], at: int,
                  frame_s: float) -> tuple[int, str]:
    """What is wrong with a part of a log-mel that should be the source's at frame `at`; the worst first."""

    def there(lag: int) -> NDArray[np.float32]:
        return source[:, at + lag : at + lag + part.shape[1]]

    def difference(lag: int) -> float:
        by_value = part - there(lag)
        return float(np.abs(by_value - by_value.mean()).mean())

    def is_heard(values: NDArray[np.float32]) -> bool:
        return bool((values > _AUDIBLE).mean() > _AUDIBLE_SHARE)

    near = round(_TOLERANCE_S / frame_s)
    lag = min(range(-near, near + 1), key=difference)
    heard = is_heard(part), is_heard(there(lag))
    if heard == (False, False):
        return _RIGHT, ""
    if heard == (False, True):
        return 0, "is silent where its source is not"
    if difference(lag) > _MEL_NOISE:
        search = round(SOUND_SEARCH_S / frame_s)
        best = min(range(-search, search + 1), key=difference)
        if difference(lag) > _MEL_NOISE + 2 * difference(best):
            return 1, f"is that of {_shift(best * frame_s)}"
    audible = np.maximum(part, there(lag)) > _AUDIBLE
    level = float(np.median((part - there(lag))[audible]))
    gained = np.log(_FLOOR + np.exp(level) * np.maximum(0, np.exp(there(lag)) - _FLOOR))  # silence stays what it is
    if np.abs(part - gained).mean() > _OTHER_MEL:
        return 2, f"is none of that within {SOUND_SEARCH_S:g} s there"
    if not abs(level) <= _LEVEL_TOLERANCE:
        return 3, f"is {level:+.2f} in log-mel against the mean of its source's channels"
    return _RIGHT, ""


def _waveform(around: Around, first: int, samples: int) -> NDArray[np.float32]:
    """The source's sound from a sample on; silence where it has none."""
    waveform = np.zeros(samples, np.float32)
    for at, piece in around.pieces:
        skipped = max(0, first - at)
        part = piece[skipped : max(skipped, first + samples - at)]
        waveform[at + skipped - first : at + skipped - first + len(part)] = part
    return waveform
