"""avprep against bare ffmpeg on Kinetics-like videos: CPU seconds a clip, and what a second worker brings."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the avprep command does, before numpy is imported

from avprep.build import BuildOptions, build_split
from avprep.logmel import log_mel
from avprep.media import ffmpeg_path
from avprep.spec import ClipSpec
from benchmarks import Row, share_of, times_faster

_VIDEOS, _ROUNDS = 20, 2
_SPEC = ClipSpec()


def run() -> list[Row]:
    """The same 20 videos through bare ffmpeg, one worker, and two workers, in turn."""
    import numpy as np
    import webdataset  # noqa: F401

    # Its import and librosa's are paid once a build, not a clip.
    log_mel(np.zeros(_SPEC.segment_samples, np.float32), _SPEC)
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw"
        _make_videos(raw)
        bare, one, two = [], [], []
        for number in range(_ROUNDS):
            bare.append(_cost(partial(_bare_ffmpeg, raw, Path(scratch))))
            one.append(_cost(partial(_build, raw, Path(scratch) / f"one{number}", 1)))
            two.append(_cost(partial(_build, raw, Path(scratch) / f"two{number}", 2)))
    bare_s, one_s = (statistics.median(cost.cpu_s for cost in costs) / _VIDEOS for costs in (bare, one))
    return [
        share_of("clip: CPU time / bare ffmpeg's (decode, scale, encode; sound)", "s", one_s, bare_s, 1.3),
        times_faster("20 clips: wall time of 1 worker / 2 workers", statistics.median(cost.wall_s for cost in two),
                     statistics.median(cost.wall_s for cost in one), 1.8),
    ]


def _make_videos(raw: Path) -> None:
    """30 s of 340 x 256 at 30 fps with stereo sound, like a Kinetics download: moving shapes over film grain."""
    raw.mkdir()
    for number in range(_VIDEOS):
        subprocess.run(
            [ffmpeg_path(), "-nostdin", "-loglevel", "error", "-y", "-f", "lavfi", "-i",
             f"mandelbrot=s=340x256:r=30:start_x=-0.74{number:02d},noise=alls=6:allf=t", "-f", "lavfi", "-i",
             f"sine={200 + 20 * number}:r=44100:b=3", "-t", "30", "-c:v", "libx264", "-preset", "superfast",
             "-crf", "23", "-pix_fmt", "yuv420p", "-c:a", "aac", "-ac", "2",
             str(raw / f"{number:02d}.mp4")], check=True)


def _bare_ffmpeg(raw: Path, scratch: Path) -> None:
    for video in sorted(raw.iterdir()):
        quiet = [ffmpeg_path(), "-nostdin", "-loglevel", "error", "-y", "-threads", "1", "-i", str(video)]
        subprocess.run([*quiet, "-an", "-vf", "fps=16,scale=-2:160:flags=bicubic", "-filter_threads", "1", "-c:v",
                        "libx264", "-preset", "veryfast", "-crf", "23", "-g", "32", "-threads", "1",
                        str(scratch / "bare.mp4")], check=True)
        subprocess.run([*quiet, "-vn", "-ac", "1", "-ar", "44100", "-f", "f32le", str(scratch / "bare.f32")],
                       check=True)


def _build(raw: Path, out: Path, workers: int) -> None:
    options = BuildOptions("folder", raw, out, _SPEC, workers, 256_000_000, 600.0)
    assert build_split(options, "train").clips == _VIDEOS


@dataclass(frozen=True)
class _Cost:
    cpu_s: float
    wall_s: float


def _cost(work: Callable[[], None]) -> _Cost:
    def cpu_s() -> float:
        return sum(usage.ru_utime + usage.ru_stime for usage in (
            resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)))

    cpu_before, wall_before = cpu_s(), time.perf_counter()
    work()
    return _Cost(cpu_s() - cpu_before, time.perf_counter() - wall_before)
