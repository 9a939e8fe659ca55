"""The only door to ffmpeg: probe a file, cut a clip out of it. Its errors leave here as `SourceFailed`."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av
import ffmpeg
import numpy as np
from numpy.typing import NDArray

from avprep.errors import AvprepError, Reason, SourceFailed
from avprep.spec import REFERENCE_STEP, ClipSpec

# Files come from strangers: no network or device behind a playlist, no picture that eats the memory.
_SAFE_INPUT = {"protocol_whitelist": "file", "max_pixels": 8192 * 8192}
_PROBE_TIMEOUT_S = 30.0
# A clip that lacks more than this of what the container promised was cut off in download.
_MISSING_SHARE, _MISSING_S = 0.1, 0.5


@dataclass(frozen=True)
class Media:
    """What a file holds: its length and the streams that belong together.

    Attributes:
        length_s: from the file's first instant to the end of the longer chosen stream.
        video_index: the best video stream, as its number in the file; None without pictures.
        audio_index: the sound that goes with it; None without sound.
        bits_per_s: of the whole file; 0 where unknown.
    """

    length_s: float
    video_index: int | None
    audio_index: int | None
    bits_per_s: int


@lru_cache(maxsize=1)
def ffmpeg_path() -> str:
    """The system's ffmpeg if it can encode H.264, else the one in the imageio-ffmpeg wheel."""
    system = shutil.which("ffmpeg")
    if system:
        encoders = subprocess.run([system, "-hide_banner", "-encoders"], capture_output=True, text=True, check=False)
        if "libx264" in encoders.stdout:
            return system
    import imageio_ffmpeg

    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise AvprepError("no ffmpeg with libx264 found: install ffmpeg (apt, brew, conda), or reinstall the "
                          "imageio-ffmpeg wheel, which carries one") from error


@lru_cache(maxsize=1)
def ffmpeg_version() -> str:
    """The version word of `ffmpeg -version`."""
    first_line = subprocess.run([ffmpeg_path(), "-version"], capture_output=True, text=True, check=True).stdout
    return first_line.split()[2]


def probe(path: Path) -> Media:
    """Read a file's headers.

    Raises:
        SourceFailed: empty, unreadable, without a stream, or of no length.
    """
    if path.stat().st_size == 0:
        raise SourceFailed("probe", Reason.EMPTY)
    try:
        with av.open(str(path), timeout=_PROBE_TIMEOUT_S, options={"protocol_whitelist": "file"}) as container:
            video = _best_video(container)
            audio = container.streams.best("audio", related=video)
            if video is None and audio is None:
                raise SourceFailed("probe", Reason.NO_STREAMS)
            length_s = _length_s(container, [stream for stream in (video, audio) if stream is not None])
            if length_s is None:
                length_s = _length_by_packets_s(container)
            media = Media(length_s, video.index if video else None, audio.index if audio else None,
                          container.bit_rate or 0)
    except av.error.FFmpegError as error:
        reason = Reason.TIMEOUT if isinstance(error, av.error.ExitError) else Reason.UNREADABLE
        raise SourceFailed("probe", reason, error.strerror or "") from error
    if media.length_s <= 0:
        raise SourceFailed("probe", Reason.NO_LENGTH)
    return media


def _best_video(container: av.container.InputContainer) -> av.video.stream.VideoStream | None:
    best = container.streams.best("video")
    # A cover picture in a sound file is no video.
    if best is None or best.disposition & av.stream.Disposition.attached_pic:
        return None
    assert isinstance(best, av.video.stream.VideoStream)
    return best


def _length_s(container: av.container.InputContainer, streams: list[av.stream.Stream]) -> float | None:
    start_s = (container.start_time or 0) / av.time_base
    ends_s = [float(((stream.start_time or 0) + stream.duration) * stream.time_base) - start_s
              for stream in streams if stream.duration is not None and stream.time_base is not None]
    if len(ends_s) == len(streams):
        return max(ends_s)
    return container.duration / av.time_base if container.duration is not None else None


def _length_by_packets_s(container: av.container.InputContainer) -> float:
    """For containers that don't state a duration (live recordings): read on to the last packet, decoding nothing."""
    start_s, end_s = (container.start_time or 0) / av.time_base, 0.0
    for packet in container.demux():
        if packet.pts is not None and packet.time_base is not None:
            end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    return end_s - start_s


def cut_clip(path: Path, media: Media, start_s: float, length_s: float, spec: ClipSpec, scratch: Path,
             timeout_s: float) -> tuple[bytes | None, NDArray[np.float32] | None]:
    """Decode, resample, scale and encode one window of a file: one ffmpeg process, one pass.

    Picture and sound are both cut at `start_s` of the file's common time line: the first frame is held, or silence
    put in, where one of the streams begins later.

    Args:
        path: the file.
        media: what `probe` said of it.
        start_s: start of the window, seconds from the file's first instant.
        length_s: length of the window.
        spec: the clip's settings.
        scratch: path of a temporary file that this call may write and removes.
        timeout_s: ffmpeg is stopped after this.

    Returns:
        (mp4 bytes or None without pictures, mono waveform (samples,) float32 in [-1, 1] or None without sound)

    Raises:
        SourceFailed: ffmpeg met an error, ran out of time or was killed.
    """
    seek = {"ss": f"{start_s:.6f}"} if start_s > 0 else {}
    source = ffmpeg.input(f"file:{_as_text(path.absolute())}", t=f"{length_s:.6f}", threads=1, **seek, **_SAFE_INPUT)
    outputs = []
    if media.video_index is not None:
        pictures = _scaled(source[str(media.video_index)].filter("fps", fps=spec.fps, start_time=0), spec)
        outputs.append(ffmpeg.output(pictures, _as_text(scratch), **_h264(spec)))
    if media.audio_index is not None:
        # async=1 fills gaps and trims overlaps in the time stamps; it never stretches.
        sound = source[str(media.audio_index)].filter("aresample", spec.sample_rate_hz, first_pts=0, **{"async": 1})
        outputs.append(ffmpeg.output(sound, "pipe:1", format="f32le", acodec="pcm_f32le", ac=1, ar=spec.sample_rate_hz))
    command = ffmpeg.merge_outputs(*outputs).global_args(
        "-nostdin", "-loglevel", "error", "-filter_complex_threads", "1", "-max_error_rate", "0")
    try:
        stdout = _run(command.compile(cmd=_as_text(Path(ffmpeg_path())), overwrite_output=True), timeout_s)
        mp4 = scratch.read_bytes() if media.video_index is not None else None
    finally:
        scratch.unlink(missing_ok=True)
    waveform = np.frombuffer(stdout, np.float32) if media.audio_index is not None else None
    if waveform is not None:
        waveform = waveform[: round(length_s * spec.sample_rate_hz)]
    return mp4, waveform if waveform is not None and len(waveform) else None


def _scaled(pictures: ffmpeg.nodes.FilterableStream, spec: ClipSpec) -> ffmpeg.nodes.FilterableStream:
    """Square pixels, short side to the spec (never enlarged), sides even as yuv420p needs them."""
    wide = "iw*if(gt(sar,0),sar,1)"  # sar, the shape of a pixel, is 0 where a file doesn't state it
    shrink = f"min(1,{spec.short_side}/min({wide},ih))"
    width, height = f"max(2,2*round({wide}*{shrink}/2))", f"max(2,2*round(ih*{shrink}/2))"
    return pictures.filter("scale", w=width, h=height, flags="bicubic").filter("setsar", 1)


def _h264(spec: ClipSpec) -> dict[str, object]:
    """Encoder options: a segment is a closed group of pictures with evenly spaced references; one thread, which gives
    the same bytes on any machine."""
    return {"vcodec": "libx264", "preset": "veryfast", "crf": spec.crf, "pix_fmt": "yuv420p", "frames:v": spec.frames,
            "g": spec.segment_frames, "keyint_min": spec.segment_frames, "sc_threshold": 0, "threads:v": 1,
            "bf": REFERENCE_STEP - 1, "b_strategy": 0, "x264-params": "b-pyramid=none",
            "map_metadata": -1, "map_chapters": -1, "fflags": "+bitexact", "flags:v": "+bitexact+cgop", "format": "mp4"}


def _as_text(path: Path) -> str:
    """A path whose bytes are letters of Latin-1: ffmpeg-python takes no names that are not UTF-8."""
    return os.fsencode(path).decode("latin-1")


def _run(command: list[str], timeout_s: float) -> bytes:
    # A session of its own: Ctrl-C on the terminal reaches avprep alone, not a half-finished clip.
    arguments = [part.encode("latin-1") for part in command]  # see _as_text
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise SourceFailed("decode", Reason.TIMEOUT, f"after {timeout_s:g} s") from error
    if process.returncode < 0:
        raise SourceFailed("decode", Reason.CRASHED, f"by signal {-process.returncode}; if memory ran out, build again "
                           "with --force and fewer --workers")
    if process.returncode != 0:
        if b"No space left on device" in stderr:
            raise AvprepError("the disk is full: free some space and run the same command again to go on")
        lines = [line for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
        detail = lines[0].split("] ")[-1] if lines else f"ffmpeg ended with code {process.returncode}"
        raise SourceFailed("decode", Reason.CORRUPT, detail[:200])
    return stdout


def check_length(picture_s: float, sound_s: float, expected_s: float) -> None:
    """Refuse a clip of which far less was decoded than its container promised.

    Raises:
        SourceFailed: more than a tenth of the window (and more than half a second) is missing from both streams.
    """
    missing_s = expected_s - max(picture_s, sound_s)
    if missing_s > max(_MISSING_S, _MISSING_SHARE * expected_s) or max(picture_s, sound_s) == 0:
        raise SourceFailed("decode", Reason.TRUNCATED,
                           f"{expected_s - missing_s:.1f} of {expected_s:.1f} s could be decoded")
