"""Material that carries its own time, and reading it back out of stored clips with tarfile, PyAV and numpy alone.

Picture: the left half's grey tells the whole second, the right half's the tenth. Sound: a beep of 0.2 s at every whole
second, whose pitch tells the second modulo 10.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

_TENTH_GREY, _SECOND_GREY, _DARKEST = 20, 2, 30
# A pixel of the left half is one grey for each second, of the right half one for each tenth.
PICTURE = (f"color=black:s=64x48:r=20,format=gray,geq=lum='{_DARKEST}+if(lt(X,32),{_SECOND_GREY}*floor(T+0.001),"
           f"{_TENTH_GREY}*mod(floor(10*T+0.01),10))',format=yuv420p")
SOUND = "aevalsrc='0.5*sin(2*PI*(500+200*mod(floor(t),10))*t)*lt(mod(t,1),0.2)':s={rate}"
PICTURE_STEP_S = 0.1


def source(seconds: float, rate_hz: int = 48_000) -> list[object]:
    """ffmpeg's arguments for two inputs: picture and sound of so many seconds."""
    return [*picture(seconds), *sound(seconds, rate_hz)]


def picture(seconds: float) -> list[object]:
    """ffmpeg's arguments for the picture alone."""
    return ["-f", "lavfi", "-t", seconds, "-i", PICTURE]


def sound(seconds: float, rate_hz: int = 48_000) -> list[object]:
    """ffmpeg's arguments for the sound alone."""
    return ["-f", "lavfi", "-t", seconds, "-i", SOUND.format(rate=rate_hz)]


@dataclass
class Stored:
    """One sample: its json, what its frames say (s of the source) and its beeps (s of the clip, second modulo 10)."""

    info: dict[str, Any]
    frames_s: list[float]
    beeps: list[tuple[float, int]]
    log_mel: np.ndarray | None

    def assert_in_step(self, from_s: float, picture_s: float | None, sound_s: float | None, within_s: float = 0.1,
                       held_s: float = 0.0, silent_s: float = 0.0) -> None:
        """Picture and sound are those of `from_s` of the source on, so long as they last; after what is held or silent
        at the start, from the clip's begin."""
        assert (picture_s is None) == (not self.frames_s) and (sound_s is None) == (self.log_mel is None)
        if picture_s is not None:
            assert abs(len(self.frames_s) / 16 - picture_s) <= 0.15
            right_s = np.maximum(np.arange(len(self.frames_s)) / 16, held_s) + from_s
            # What is shown is a tenth that began up to a tenth before.
            wrong_by_s = np.abs(np.array(self.frames_s) + PICTURE_STEP_S / 2 - right_s)
            assert wrong_by_s.max() <= within_s + PICTURE_STEP_S / 2 + 1 / 16, (wrong_by_s.argmax(), wrong_by_s.max())
        if sound_s is not None:
            assert abs(self.info["sound_s"] - sound_s) <= 0.15
            whole = range(int(np.ceil(from_s + silent_s - 0.05)), int(np.ceil(from_s + sound_s - 0.25)))
            found = {tone: at_s for at_s, tone in self.beeps} if len(whole) <= 10 else None
            assert [tone for _, tone in self.beeps][:len(whole)] == [second % 10 for second in whole], self.beeps
            late = [at_s - (second - from_s) for (at_s, _), second in zip(self.beeps, whole, strict=False)]
            assert max(map(abs, late)) <= within_s, (found, late)


def read(folder: Path) -> list[Stored]:
    """Every sample of a split's folder, by source and start."""
    stored = []
    for path in sorted(folder.glob("*.tar")):
        members: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                members.setdefault(key, {})[ending] = tar.extractfile(member).read()  # type: ignore[union-attr]
        stored += [_read_sample(sample) for sample in members.values()]
    return sorted(stored, key=lambda one: (one.info["source"], one.info["start_s"]))


def _read_sample(members: dict[str, bytes]) -> Stored:
    frames_s, beeps, log_mel = [], [], None
    if "mp4" in members:
        with av.open(io.BytesIO(members["mp4"])) as container:
            for frame in container.decode(video=0):
                grey = frame.to_ndarray(format="yuv420p")[:frame.height].astype(float)
                second, tenth = (grey[4:-4, part].mean() for part in (slice(4, frame.width // 2 - 4),
                                                                      slice(frame.width // 2 + 4, frame.width - 4)))
                frames_s.append(round((_full(second) - _DARKEST) / _SECOND_GREY)
                                + round((_full(tenth) - _DARKEST) / _TENTH_GREY) / 10)
    if "logmel.npy" in members:
        log_mel = np.load(io.BytesIO(members["logmel.npy"]), allow_pickle=False).astype(np.float32)
        beeps = _beeps(log_mel)
    return Stored(json.loads(members["json"]), frames_s, beeps, log_mel)


def _full(luma: float) -> float:
    """Limited-range luma as the grey that it was made of."""
    return (luma - 16) * 255 / 219


def _beeps(log_mel: np.ndarray) -> list[tuple[float, int]]:
    number = np.arange(log_mel.shape[1])
    times_s = (number // 128 * 88_200 + number % 128 * 690) / 44_100
    edges_mel = np.linspace(0, 2595 * np.log10(1 + 22_050 / 700), 82)[1:-1]
    centres_hz = 700 * (10 ** (edges_mel / 2595) - 1)
    loud = log_mel.max(0) > (log_mel.min() + log_mel.max()) / 2
    starts = np.flatnonzero(loud & ~np.append(False, loud[:-1]))
    ends = [next((frame for frame in range(start, len(loud)) if not loud[frame]), len(loud)) for start in starts]
    return [(float(times_s[start]), round((centres_hz[log_mel[:, start + 2:end - 1].mean(1).argmax()] - 500) / 200))
            for start, end in zip(starts, ends, strict=True) if end - start >= 6]
