"""The demo dataset: short videos of eight classes, told apart only by what moves how and what is heard.

A class is a way of moving and a way of sounding, locked to one irregular beat. Everything else (colours, background,
shape, place, pitch, timbre, loudness, noise) is drawn anew at every cut, every two seconds, so neither mean colour nor
loudness tells the class, and a clip can't be recognised by its looks.
"""

from __future__ import annotations

import shutil
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from avprep.errors import AvprepError
from avprep.executors import run_local
from avprep.media import ffmpeg_path
from avprep.progress import progress

COUNTS = {"train": 200, "test": 100}
_CLIP_S, _CUT_S = 30.0, 2.0
_FPS, _WIDTH, _HEIGHT, _SAMPLE_RATE_HZ = 16, 96, 72, 44_100
_BEAT_S = (0.7, 1.6)  # mean length of a beat, constant within a clip
_QUICK_AAC = ("-aac_coder", "fast", "-aac_tns", "0", "-aac_is", "0", "-aac_ms", "0", "-aac_pns", "0")  # half the time
_SWAY = 0.22  # of the picture's height: how far things move

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class _Pose:
    """Where the shape is relative to its place (in heights), how large, how turned (radians), how visible."""

    x: Floats | float = 0.0
    y: Floats | float = 0.0
    scale: Floats | float = 1.0
    angle: Floats | float = 0.0
    alpha: Floats | float = 1.0


# Motions: (position within the beat in [0, 1), a number in [-1, 1] drawn for each beat) -> pose.
_MOTIONS: dict[str, Callable[[Floats, Floats], _Pose]] = {
    "swing": lambda u, r: _Pose(x=_SWAY * np.sin(2 * np.pi * u)),
    "bounce": lambda u, r: _Pose(y=_SWAY * (1 - 2 * np.abs(np.sin(np.pi * u)))),
    "circle": lambda u, r: _Pose(x=_SWAY * np.sin(2 * np.pi * u), y=_SWAY * np.cos(2 * np.pi * u)),
    "pulse": lambda u, r: _Pose(scale=1 + 0.5 * np.sin(2 * np.pi * u)),
    "blink": lambda u, r: _Pose(alpha=(u < 0.5).astype(np.float32)),
    "spin": lambda u, r: _Pose(angle=2 * np.pi * u),
    "jump": lambda u, r: _Pose(x=_SWAY * r, y=np.float32(_SWAY) * np.sin(40 * r)),
    "slide": lambda u, r: _Pose(x=_SWAY * (2 * u - 1)),
}

# Sounds: the same arguments -> (pitch in octaves above the scene's, amplitude in [0, 1]).
_SOUNDS: dict[str, Callable[[Floats, Floats], tuple[Floats, Floats]]] = {
    "swing": lambda u, r: (0.5 * np.sin(2 * np.pi * u), np.ones_like(u)),
    "bounce": lambda u, r: (np.zeros_like(u), np.exp(-6 * u)),
    "circle": lambda u, r: (np.where(u % 0.25 < 0.125, 0.6, 0.0), np.ones_like(u)),
    "pulse": lambda u, r: (np.zeros_like(u), np.sin(np.pi * u) ** 2),
    "blink": lambda u, r: (np.zeros_like(u), (u < 0.5).astype(np.float32)),
    "spin": lambda u, r: (u, np.ones_like(u)),
    "jump": lambda u, r: (0.7 * r, np.ones_like(u)),
    "slide": lambda u, r: (-u, np.exp(-1.5 * u)),
}

CLASSES = tuple(sorted(_MOTIONS))


def make_demo(folder: Path, workers: int, counts: dict[str, int] | None = None, seed: int = 0) -> None:
    """Write `folder/SPLIT/CLASS/NNNN.mp4`, 96 x 72 H.264 at 16 fps with 44.1-kHz sound, the classes in turn.

    The whole folder appears when it is complete. The same seed gives the same videos.
    """
    part = folder.with_name(folder.name + ".part")
    videos = [(part / split / CLASSES[number % len(CLASSES)] / f"{number:04d}.mp4", seed)
              for split, count in (counts or COUNTS).items() for number in range(count)]
    if part.exists():
        shutil.rmtree(part)  # of a run that was stopped: what it left would be taken for videos
    for path, _ in videos:
        path.parent.mkdir(parents=True, exist_ok=True)
    made = run_local(partial(_make_video, root=part), videos, workers)
    for _ in progress(made, "demo", "video", len(videos)):
        pass
    if folder.is_dir():
        folder.rmdir()  # checked to be empty by the caller
    part.rename(folder)


def _make_video(video: tuple[Path, int], root: Path) -> None:
    path, seed = video
    rng = default_rng([seed, zlib.crc32(path.relative_to(root).as_posix().encode())])
    beats = _Beats(rng)
    name = path.parent.name
    frames = _pictures(name, beats, rng)
    waveform = _sound(name, beats, rng)
    sound_file = path.with_suffix(".f32")
    sound_file.write_bytes(waveform.tobytes())
    command = [ffmpeg_path(), "-nostdin", "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24",
               "-video_size", f"{_WIDTH}x{_HEIGHT}", "-framerate", str(_FPS), "-i", "pipe:0",
               "-f", "f32le", "-ar", str(_SAMPLE_RATE_HZ), "-ac", "1", "-i", str(sound_file),
               "-c:v", "libx264", "-preset", "ultrafast", "-crf", "26", "-threads", "1", "-pix_fmt", "yuv420p",
               "-c:a", "aac", *_QUICK_AAC, "-fflags", "+bitexact", "-flags", "+bitexact", str(path)]
    done = subprocess.run(command, input=frames.tobytes(), capture_output=True, check=False)
    sound_file.unlink()
    if done.returncode:
        raise AvprepError(f"ffmpeg could not write {path}: {done.stderr.decode(errors='replace').strip()}")


class _Beats:
    """An irregular beat that picture and sound of one video share."""

    def __init__(self, rng: Generator) -> None:
        lengths_s = rng.uniform(*_BEAT_S) * rng.uniform(0.75, 1.35, size=64)
        self._starts_s = np.concatenate([[0.0], np.cumsum(lengths_s)]) - lengths_s[0] * rng.uniform()
        self._draws = rng.uniform(-1, 1, size=64)

    def at(self, times_s: NDArray[np.float64]) -> tuple[Floats, Floats]:
        """(position within the beat, the beat's own random number) at each time."""
        phase = np.interp(times_s, self._starts_s, np.arange(len(self._starts_s)))
        return (phase % 1.0).astype(np.float32), self._draws[phase.astype(int)].astype(np.float32)


def _pictures(name: str, beats: _Beats, rng: Generator) -> NDArray[np.uint8]:
    """(frames, height, width, 3) uint8."""
    times_s = np.arange(int(_CLIP_S * _FPS)) / _FPS
    return np.concatenate([_scene_pictures(name, scene, beats, rng)
                           for scene in np.split(times_s, int(_CLIP_S / _CUT_S))])


def _scene_pictures(name: str, times_s: NDArray[np.float64], beats: _Beats, rng: Generator) -> NDArray[np.uint8]:
    count = len(times_s)
    pose = _MOTIONS[name](*beats.at(times_s))
    y, x = (np.mgrid[0:_HEIGHT, 0:_WIDTH] / _HEIGHT).astype(np.float32)
    frames = np.repeat(_background(x, y, rng)[None], count, axis=0)
    seconds = (times_s - times_s[0]).astype(np.float32)[:, None, None]
    # A second shape drifts by, whatever the class.
    drift = rng.uniform(-0.12, 0.12, size=2).astype(np.float32)
    _draw_shape(frames, x, y, _Pose(x=drift[0] * seconds, y=drift[1] * seconds), rng)
    _draw_shape(frames, x, y, _Pose(**{axis: np.broadcast_to(np.asarray(value, np.float32), count)[:, None, None]
                                       for axis, value in vars(pose).items()}), rng)
    # One field of noise, shifted from frame to frame, costs a fraction of fresh noise.
    noise = rng.uniform(1, 5) * rng.standard_normal((2 * _HEIGHT, 2 * _WIDTH, 1), np.float32)
    for frame, down, across in zip(frames, rng.integers(_HEIGHT, size=count), rng.integers(_WIDTH, size=count),
                                   strict=True):
        frame += noise[down : down + _HEIGHT, across : across + _WIDTH]
    return frames.clip(0, 255, out=frames).astype(np.uint8)


def _background(x: Floats, y: Floats, rng: Generator) -> Floats:
    """Two colours in a wavy blend: (height, width, 3), 0 to 255."""
    first, second = rng.uniform(0, 255, size=(2, 3))
    direction = rng.uniform(-4, 4, size=2)
    blend = 0.5 + 0.5 * np.sin(direction[0] * x + direction[1] * y + rng.uniform(0, 6) + np.sin(5 * x * y))
    return np.asarray(first + blend[..., None] * (second - first), np.float32)


def _draw_shape(frames: Floats, x: Floats, y: Floats, pose: _Pose, rng: Generator) -> None:
    """A box of random colour, size, turn and place, moved by `pose` (float32 arrays of (frames, 1, 1) or numbers)."""
    place = rng.uniform((0.42, 0.38), (_WIDTH / _HEIGHT - 0.42, 0.62)).astype(np.float32)
    length, thickness = rng.uniform((0.09, 0.04), (0.17, 0.10)).astype(np.float32)
    turn = np.float32(rng.uniform(0, np.pi)) + pose.angle
    across, down = x - (place[0] + pose.x), y - (place[1] + pose.y)
    along = np.abs(np.cos(turn) * across + np.sin(turn) * down) - length * pose.scale
    beside = np.abs(np.cos(turn) * down - np.sin(turn) * across) - thickness * pose.scale
    coverage = (0.5 - _HEIGHT * np.maximum(along, beside)).clip(0, 1) * pose.alpha  # the edge is one pixel soft
    frames += coverage[..., None] * (rng.uniform(0, 255, size=3).astype(np.float32) - frames)


def _sound(name: str, beats: _Beats, rng: Generator) -> Floats:
    """(samples,), within [-1, 1]."""
    samples = int(_CLIP_S * _SAMPLE_RATE_HZ)
    # Pitch and amplitude are drawn 441 times a second and joined by lines: tones start and stop without a click.
    coarse_s = np.arange(int(_CLIP_S * 441) + 1) / 441
    octaves, amplitude = _SOUNDS[name](*beats.at(coarse_s))
    scene = np.minimum(coarse_s // _CUT_S, _CLIP_S / _CUT_S - 1).astype(int)
    scenes = scene[-1] + 1
    pitch_hz = 2 ** rng.uniform(np.log2(150), np.log2(900), size=scenes)[scene] * 2**octaves
    brightness = rng.uniform(0.3, 0.9, size=scenes)[scene]
    loudness = 10 ** rng.uniform(-1.3, -0.5, size=scenes)[scene] * amplitude
    noisiness = 10 ** rng.uniform(-3.5, -1.8, size=scenes)[scene]

    def fine(values: NDArray[np.floating]) -> Floats:
        positions = np.arange(samples) / (_SAMPLE_RATE_HZ / 441)
        return np.asarray(np.interp(positions, np.arange(len(values)), values), np.float32)

    cycles = np.cumsum(fine(pitch_hz), dtype=np.float64) / _SAMPLE_RATE_HZ
    phase = (2 * np.pi * (cycles % 1)).astype(np.float32)
    tone: Floats = np.zeros(samples, np.float32)
    bright = fine(brightness)
    for harmonic in range(5, 0, -1):
        tone = tone * bright + np.sin(harmonic * phase)
    tone *= fine(loudness) / 2
    tone += fine(noisiness) * rng.standard_normal(samples, np.float32)
    return np.clip(tone, -1, 1, out=tone)
