"""The loader: CPU seconds of a training clip from a shard, against bare decoding and against reading raw videos."""

from __future__ import annotations

import io
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import librosa
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from avprep.build import BuildOptions, build_split
from avprep.media import ffmpeg_path
from avprep.spec import ClipSpec
from avtrain.config import read_config
from avtrain.data.clips import ClipDataset
from avtrain.data.order import fixed_order
from avtrain.data.shards import ShardReader, open_folders
from benchmarks import Row, interleaved_medians, share_of

_MEDIA = Path(os.environ.get("AV_SHARED", Path(__file__).parents[2] / "shared")) / "media"
# Real videos with sound (file, start in seconds); without that folder, drawn ones take their place.
_REAL = [("pancake.mkv", 0), ("v2d_test.mp4", 0), ("v2d_test.mp4", 60), ("bigbuckbunny.mp4", 0)]
_ROUNDS = 7
_SPEC = ClipSpec()
_CONFIG = read_config("paper").data


def run() -> list[Row]:
    """Per clip of 15 x 32 frames, one thread, CPU time: ours, bare decoding of the same H.264, and from raw files."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # librosa's matrix product would leave numpy's threads waiting at full speed for 0.1 s, on the account of what
        # is measured next.
        with tempfile.TemporaryDirectory() as scratch, threadpool_limits(1):
            raw = Path(scratch) / "raw"
            _make_videos(raw)
            options = BuildOptions("folder", raw, Path(scratch), _SPEC, 2, 256_000_000, 600.0)
            assert build_split(options, "train").clips == len(_REAL)
            return _rows(Path(scratch) / "folder" / "train", sorted(raw.iterdir()))
    finally:
        torch.set_num_threads(threads)


def _rows(shards: Path, videos: list[Path]) -> list[Row]:
    folder = open_folders([str(shards)])
    dataset, reader = ClipDataset(folder, _CONFIG, 0), ShardReader(folder)
    places = fixed_order([shard.clips for shard in folder.shards])
    stored = [reader.read(*place)[1]["mp4"] for place in places]
    routes = _routes()
    epochs = iter(range(1_000_000))  # another view every time

    def ours() -> None:
        epoch = next(epochs)
        batch = dataset.__getitems__([(place, epoch) for place in places])
        assert batch.visual_present.all() and batch.audio_present.all() and not batch.unreadable

    def bare() -> None:
        for mp4 in stored:
            assert _decode_only(mp4) == _SPEC.frames

    def from_raw(route: Callable[[str], Tensor]) -> Callable[[], None]:
        return lambda: _raw_batch(videos, route)

    seconds, bare_s, *raw_s = (total / len(places) for total in interleaved_medians(
        _ROUNDS, ours, bare, *map(from_raw, routes.values()), clock=time.process_time))
    best_s, best = min(zip(raw_s, routes, strict=True))
    return [share_of("training clip: CPU time / bare decoding of its H.264 (PyAV)", "s", seconds, bare_s, 2.0),
            share_of(f"training clip: CPU time / from the raw video ({best} the fastest of {', '.join(routes)})", "s",
                     seconds, best_s, 1 / 3)]


def _make_videos(raw: Path) -> None:
    """30 s of 340 x 256 at 30 fps with stereo sound, like a Kinetics download."""
    raw.mkdir()
    for number, (name, start_s) in enumerate(_REAL):
        source = ["-stream_loop", "-1", "-ss", str(start_s), "-i", str(_MEDIA / name)]
        if not _MEDIA.is_dir():
            source = ["-f", "lavfi", "-i", f"mandelbrot=s=340x256:r=30:start_x=-0.74{number:02d},noise=alls=6:allf=t",
                      "-f", "lavfi", "-i", f"sine={200 + 20 * number}:r=44100:b=3"]
        subprocess.run([ffmpeg_path(), "-nostdin", "-loglevel", "error", "-y", *source, "-t", "30", "-vf",
                        "fps=30,scale=340:256:flags=bicubic,setsar=1", "-c:v", "libx264", "-crf", "23", "-pix_fmt",
                        "yuv420p", "-c:a", "aac", "-ac", "2", "-ar", "44100", str(raw / f"{number:02d}.mp4")],
                       check=True)


def _decode_only(mp4: bytes) -> int:
    with av.open(io.BytesIO(mp4)) as container:
        container.streams.video[0].thread_type = "NONE"
        return sum(1 for _ in container.decode(video=0))


def _routes() -> dict[str, Callable[[str], Tensor]]:
    """Ways to the training frames of a raw video, (480, 3, 112, 112) uint8: those that are installed, else PyAV's."""
    known = {"torchcodec": _by_torchcodec, "decord": _by_decord}
    return {name: route for name, route in known.items() if find_spec(name)} or {"PyAV": _by_pyav}


def _raw_batch(videos: list[Path], route: Callable[[str], Tensor]) -> None:
    size = (_CONFIG.segments, _CONFIG.segment_frames)
    visual = torch.stack([route(str(video)).unflatten(0, size).transpose(1, 2) for video in videos])
    audio = torch.stack([torch.from_numpy(_librosa_log_mel(str(video))) for video in videos])
    assert visual.shape == (len(videos), 15, 3, 32, 112, 112) and audio.shape[1:] == (80, 1918)


def _frame_numbers(frames: int) -> list[int]:
    """Which of the 30 frames a second are shown at 16 a second."""
    return [min(frames - 1, round(number * 30 / _SPEC.fps)) for number in range(_SPEC.frames)]


def _by_torchcodec(video: str) -> Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder: Any = VideoDecoder(video, num_ffmpeg_threads=1, seek_mode="approximate")
    return _resized_crop(decoder.get_frames_at(_frame_numbers(len(decoder))).data)


def _by_decord(video: str) -> Tensor:
    import decord

    scale = np.random.uniform(*_CONFIG.scale) / 256
    reader = decord.VideoReader(video, width=round(340 * scale), height=round(256 * scale), num_threads=1)
    frames = torch.from_numpy(reader.get_batch(_frame_numbers(len(reader))).asnumpy())
    top, left = (int(torch.randint(size - _CONFIG.crop + 1, ())) for size in frames.shape[1:3])
    return frames[:, top:top + _CONFIG.crop, left:left + _CONFIG.crop].permute(0, 3, 1, 2).contiguous()


def _by_pyav(video: str) -> Tensor:
    numbers = set(_frame_numbers(900))
    with av.open(video) as container:
        container.streams.video[0].thread_type = "NONE"
        shown = [frame.to_ndarray(format="rgb24") for number, frame in enumerate(container.decode(video=0))
                 if number in numbers]
    shown += shown[-1:] * (_SPEC.frames - len(shown))
    return _resized_crop(torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2))


def _resized_crop(frames: Tensor) -> Tensor:
    """A square that is 112 wide once the short side is scaled to 128..160: cut out first, then resized as uint8."""
    height, width = frames.shape[2:]
    side = round(min(height, width) * _CONFIG.crop / np.random.uniform(*_CONFIG.scale))
    top, left = int(torch.randint(height - side + 1, ())), int(torch.randint(width - side + 1, ()))
    square = frames[:, :, top:top + side, left:left + side]
    return F.interpolate(square, (_CONFIG.crop, _CONFIG.crop), mode="bilinear", antialias=True)


def _librosa_log_mel(video: str) -> NDArray[np.float32]:
    """(80, frames) of the whole sound, mono."""
    with av.open(video) as container:
        container.streams.audio[0].thread_type = "NONE"
        sound = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], 1)
    mono = sound.mean(0)[:_SPEC.segment_samples * _CONFIG.segments]
    power = librosa.feature.melspectrogram(y=mono, sr=_SPEC.sample_rate_hz, n_fft=2 * _SPEC.hop_samples,
                                           hop_length=_SPEC.hop_samples, n_mels=_CONFIG.mels, htk=True, norm=None,
                                           pad_mode="reflect")
    return np.log(power + 1e-6).astype(np.float32)
