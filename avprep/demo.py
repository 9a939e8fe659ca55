"""The demo dataset: short videos of eight classes, told apart only by what moves how and what is heard.

A class is a way of moving and a way of sounding, locked to one beat whose tempo is the clip's own. As in the world,
what is small sounds high: size and pitch go together, half of them the clip's own, half the scene's. Everything else
(colours, background, places, timbre, loudness, noise) is drawn anew at every cut, every two seconds, so neither mean
colour nor loudness tells the class, and a clip can't be recognised by its looks.
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

from avprep.crew import Crew
from avprep.errors import AvprepError
from avprep.media import ffmpeg_path
from avprep.progress import progress

_CLIP_S, _CUT_S = 30.0, 2.0
_FPS, _WIDTH, _HEIGHT, _SAMPLE_RATE_HZ = 16, 96, 72, 44_100
_BEAT_S = (0.9, 2.0)  # mean length of a beat, constant within a clip
_SHAPES = 6
_QUICK_AAC = ("-aac_coder", "fast", "-aac_tns", "0", "-aac_is", "0", "-aac_ms", "0", "-aac_pns", "0")  # half the time

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class _Pose:
    """Where a shape is relative to its place (in heights), how large, how turned (radians), how visible."""

    x: Floats | float = 0.0
    y: Floats | float = 0.0
    scale: Floats | float = 1.0
    angle: Floats | float = 0.0
    alpha: Floats | float = 1.0


# Motions: position within the beat in [0, 1) -> pose. Slow enough to be followed at four frames a second, and no class
# is another's mirror image.
_MOTIONS: dict[str, Callable[[Floats], _Pose]] = {
    "rise": lambda u: _Pose(y=-0.3 * u),
    "sink": lambda u: _Pose(y=0.3 * u),
    "grow": lambda u: _Pose(scale=np.exp(0.7 * (u - 0.5))),
    "shrink": lambda u: _Pose(scale=np.exp(-0.7 * (u - 0.5))),
    "turn": lambda u: _Pose(angle=1.3 * u),
    "sway": lambda u: _Pose(x=0.14 * np.sin(2 * np.pi * u)),
    "bob": lambda u: _Pose(y=0.14 * np.sin(2 * np.pi * u)),
    "blink": lambda u: _Pose(alpha=0.5 + 0.5 * np.sin(2 * np.pi * u)),
}

# Sounds: position within the beat -> (pitch in octaves above the scene's, amplitude in [0, 1]).
_SOUNDS: dict[str, Callable[[Floats], tuple[Floats, Floats]]] = {
    "rise": lambda u: (0.8 * (u - 0.5), np.ones_like(u)),
    "sink": lambda u: (-0.8 * (u - 0.5), np.ones_like(u)),
    "grow": lambda u: (np.zeros_like(u), np.power(10, 1.2 * (u - 1))),
    "shrink": lambda u: (np.zeros_like(u), np.power(10, -1.2 * u)),
    "turn": lambda u: (0.2 * np.sin(6 * np.pi * u), np.ones_like(u)),
    "sway": lambda u: (0.4 * np.sin(2 * np.pi * u), np.ones_like(u)),
    "bob": lambda u: (np.where(u < 0.5, 0.25, -0.25), np.ones_like(u)),
    "blink": lambda u: (np.zeros_like(u), np.power(10, 0.6 * (np.sin(2 * np.pi * u) - 1))),
}

CLASSES = tuple(sorted(_MOTIONS))


def make_demo(folder: Path, workers: int, counts: dict[str, int], seed: int = 0) -> None:
    """Write `folder/SPLIT/CLASS/NNNN.mp4`, 96 x 72 H.264 at 16 fps with 44.1-kHz sound, the classes in turn.

    The whole folder appears when it is complete. The same seed gives the same videos.
    """
    part = folder.with_name(folder.name + ".part")
    videos = [(part / split / CLASSES[number % len(CLASSES)] / f"{number:04d}.mp4", seed)
              for split, count in counts.items() for number in range(count)]
    if part.exists():
        shutil.rmtree(part)  # of a run that was stopped: what it left would be taken for videos
    for path, _ in videos:
        path.parent.mkdir(parents=True, exist_ok=True)
    with Crew(workers) as crew:
        made = crew.make(partial(_make_video, root=part), videos)
        for _ in progress(made, "demo", "video", len(videos)):
            pass
    if folder.is_dir():
        folder.rmdir()  # checked to be empty by the caller
    part.rename(folder)


def _make_video(video: tuple[Path, int], root: Path) -> None:
    path, seed = video
    rng = default_rng([seed, zlib.crc32(path.relative_to(root).as_posix().encode())])
    score = _Score(rng)
    name = path.parent.name
    frames = _pictures(name, score, rng)
    waveform = _sound(name, score, rng)
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


class _Score:
    """What picture and sound of one video share: an irregular beat, and how large and low each scene is."""

    def __init__(self, rng: Generator) -> None:
        lengths_s = rng.uniform(*_BEAT_S) * rng.uniform(0.85, 1.2, size=64)
        self._starts_s = np.concatenate([[0.0], np.cumsum(lengths_s)]) - lengths_s[0] * rng.uniform()
        # Of each scene, from 0, small and high, to 1, large and low.
        self.sizes = 0.5 * rng.uniform() + 0.5 * rng.uniform(size=int(_CLIP_S / _CUT_S))

    def beat(self, times_s: NDArray[np.float64]) -> Floats:
        """Position within the beat, in [0, 1), at each time."""
        return np.asarray(np.interp(times_s, self._starts_s, np.arange(len(self._starts_s))) % 1.0, np.float32)


def _pictures(name: str, score: _Score, rng: Generator) -> NDArray[np.uint8]:
    """(frames, height, width, 3) uint8."""
    scenes_s = np.split(np.arange(int(_CLIP_S * _FPS)) / _FPS, int(_CLIP_S / _CUT_S))
    return np.concatenate([_scene_pictures(_MOTIONS[name](score.beat(times_s)), len(times_s), float(size), rng)
                           for times_s, size in zip(scenes_s, score.sizes, strict=True)])


def _scene_pictures(pose: _Pose, count: int, size: float, rng: Generator) -> NDArray[np.uint8]:
    """Shapes of random colours, turns and places over a background, all moved in the same way."""
    y, x = (np.mgrid[0:_HEIGHT, 0:_WIDTH] / _HEIGHT).astype(np.float32)
    frames = np.repeat(_background(x, y, rng)[:, None], count, axis=1)  # (3, frames, height, width)
    by_frame = {axis: np.broadcast_to(np.asarray(value, np.float32), count)[:, None, None]
                for axis, value in vars(pose).items()}
    side = np.float32(rng.choice([-1.0, 1.0]))  # sideways and turning motions begin either way
    moved = _Pose(**{**by_frame, "x": side * by_frame["x"], "angle": side * by_frame["angle"]})
    for _ in range(_SHAPES):
        _draw_shape(frames, x, y, moved, np.float32(0.06 + 0.16 * size), rng)
    # One field of noise, shifted from frame to frame, costs a fraction of fresh noise.
    noise = rng.uniform(1, 4) * rng.standard_normal((2 * _HEIGHT, 2 * _WIDTH), np.float32)
    downs, acrosses = rng.integers(_HEIGHT, size=count), rng.integers(_WIDTH, size=count)
    for number, (down, across) in enumerate(zip(downs, acrosses, strict=True)):
        frames[:, number] += noise[down : down + _HEIGHT, across : across + _WIDTH]
    return np.moveaxis(frames.clip(0, 255, out=frames).astype(np.uint8), 0, -1)


def _background(x: Floats, y: Floats, rng: Generator) -> Floats:
    """Two colours in a wavy blend: (3, height, width), 0 to 255."""
    first, second = rng.uniform(0, 255, size=(2, 3, 1, 1))
    direction = rng.uniform(-4, 4, size=2)
    blend = 0.5 + 0.5 * np.sin(direction[0] * x + direction[1] * y + rng.uniform(0, 6) + np.sin(5 * x * y))
    return np.asarray(first + blend * (second - first), np.float32)


def _draw_shape(frames: Floats, x: Floats, y: Floats, pose: _Pose, length: np.float32, rng: Generator) -> None:
    """A box of random colour, turn and place, moved by `pose` (float32 arrays of (frames, 1, 1))."""
    place = rng.uniform(0.1, (_WIDTH / _HEIGHT - 0.1, 0.9)).astype(np.float32)
    thickness = length * np.float32(rng.uniform(0.4, 0.7))
    turn = np.float32(rng.uniform(0, np.pi)) + pose.angle
    colour = rng.uniform(0, 255, size=(3, 1, 1, 1)).astype(np.float32)
    centre_x, centre_y = place[0] + pose.x, place[1] + pose.y
    # Only where the shape ever is. It reaches as far as its corners, and an edge that is one pixel soft.
    reach = np.hypot(length, thickness) * np.max(pose.scale) + 2 / _HEIGHT
    rows, columns = (slice(max(0, int((np.min(centre) - reach) * _HEIGHT)), int((np.max(centre) + reach) * _HEIGHT) + 1)
                     for centre in (centre_y, centre_x))
    across, down = x[rows, columns] - centre_x, y[rows, columns] - centre_y
    along = np.abs(np.cos(turn) * across + np.sin(turn) * down) - length * pose.scale
    beside = np.abs(np.cos(turn) * down - np.sin(turn) * across) - thickness * pose.scale
    coverage = (0.5 - _HEIGHT * np.maximum(along, beside)).clip(0, 1) * pose.alpha
    frames[..., rows, columns] += coverage * (colour - frames[..., rows, columns])


def _sound(name: str, score: _Score, rng: Generator) -> Floats:
    """(samples,), within [-1, 1]."""
    samples = int(_CLIP_S * _SAMPLE_RATE_HZ)
    # Pitch and amplitude are drawn 441 times a second and joined by lines: tones start and stop without a click.
    coarse_s = np.arange(int(_CLIP_S * 441) + 1) / 441
    octaves, amplitude = _SOUNDS[name](score.beat(coarse_s))
    scene = np.minimum(coarse_s // _CUT_S, _CLIP_S / _CUT_S - 1).astype(int)
    scenes = scene[-1] + 1
    high = 1 - score.sizes + rng.uniform(-0.05, 0.05, size=scenes)
    pitch_hz = 200 * 2 ** (2.6 * high)[scene] * 2**octaves
    brightness = rng.uniform(0.3, 0.9, size=scenes)[scene]
    loudness = 10 ** rng.uniform(-1.2, -0.5, size=scenes)[scene] * amplitude
    noisiness = 10 ** rng.uniform(-2.6, -1.3, size=scenes)[scene]
    drone_hz = (100 * 2 ** rng.uniform(0, 4.3, size=scenes))[scene]
    drone_loudness = 10 ** rng.uniform(-1.8, -1.0, size=scenes)[scene]

    positions, coarse = np.arange(samples) / (_SAMPLE_RATE_HZ / 441), np.arange(len(coarse_s))

    def fine(values: NDArray[np.floating]) -> Floats:
        return np.asarray(np.interp(positions, coarse, values), np.float32)

    def tone(hz: NDArray[np.floating], harmonics: int) -> Floats:
        cycles = np.cumsum(fine(hz), dtype=np.float64) / _SAMPLE_RATE_HZ
        phase = (2 * np.pi * (cycles - np.floor(cycles))).astype(np.float32)
        wave = np.zeros(samples, np.float32)
        for harmonic in range(harmonics, 0, -1):
            wave = wave * bright + np.sin(harmonic * phase)
        return wave

    bright = fine(brightness)
    # The drone is there whatever the class, and tells nothing of it.
    mixed = tone(pitch_hz, 5) * (fine(loudness) / 2) + tone(drone_hz, 3) * (fine(drone_loudness) / 2)
    mixed += fine(noisiness) * rng.standard_normal(samples, np.float32)
    return np.asarray(mixed.clip(-1, 1), np.float32)
