"""The only door to ffmpeg: cut a clip out of a file. Its errors leave here as `SourceFailed`."""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import ffmpeg
import numpy as np
from numpy.typing import NDArray

from avprep.confined import NOT_STARTED, confined
from avprep.errors import AvprepError, DiskFull, Reason, SourceFailed
from avprep.probe import LOOK_AHEAD, MISSING_S, MISSING_SHARE, Media, only_this_file
from avprep.sound import Sound, on_time_line
from avprep.spec import REFERENCE_STEP, ClipSpec

# Files come from strangers: no picture that eats the memory. ffmpeg takes 0.5 GB for one of 8K (H.264), and on top what
# a clip's own settings ask for: this many pictures on their way to the file, which is never larger than its pixels.
_MOST_PIXELS = 8192 * 8192
MEMORY_BYTES, _MORE_FILE_BYTES = 1_250_000_000, 64_000_000
_PICTURES_UNDER_WAY, _WIDEST = 100, 4
_CPU_SHARE = 4  # of the time that it may take: newer versions have several threads
# Decoding begins this much before a window: the first packets after a seek often can't be decoded whole.
_LEAD_S = 1.0
# What ffmpeg ends a line with where the system refuses to write.
_NO_SPACE = ": No space left on device"
# What it says where it may not have more memory.
_NO_MEMORY = re.compile(r"allocat|malloc|get_buffer\(\) failed", re.IGNORECASE)
# Silence of more than this is worth a word.
FILLED_S = 0.1
# The mean of as many channels as there are ("<" divides by the sum of those that are), and beside it another weighting,
# in which sound of opposite phase does not cancel.
_MOST_CHANNELS = 64
_MIXES = "stereo|" + "|".join(
    f"c{number}<" + "+".join(f"{gain**channel:.6g}*c{channel}" for channel in range(_MOST_CHANNELS))
    for number, gain in enumerate((1.0, 0.8)))


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


@dataclass(frozen=True)
class Cut:
    """What was decoded of one window of a file.

    Attributes:
        mp4: H.264 without sound; None without pictures.
        picture_starts_s: when its first picture comes; before that, it is held. Infinite without pictures.
        sound: None without sound.
    """

    mp4: bytes | None
    picture_starts_s: float
    sound: Sound | None


def cut_clip(path: Path, media: Media, start_s: float, length_s: float, spec: ClipSpec, scratch: Path,
             timeout_s: float) -> Cut:
    """Decode, resample, scale and encode one window of a file: one ffmpeg process, one pass.

    Picture and sound are both cut at `start_s` of the file's common time line: the first frame is held, or silence
    put in, where one of the streams begins later.

    Seeking is not trusted: it aims a second early, and if no picture or sound is found from before the window, or what
    was found can't be decoded, the file is decoded from its start. So is a file of sound alone, as that costs little:
    after seeking, bare sound is given the times that were asked for, whatever it is.

    Args:
        path: the file.
        media: what `probe` said of it.
        start_s: start of the window, seconds from the file's first instant.
        length_s: length of the window.
        spec: the clip's settings.
        scratch: path of a temporary file; this call may write it and others beside it, and removes them.
        timeout_s: ffmpeg is stopped after this.

    Raises:
        SourceFailed: ffmpeg met an error, ran out of time or was killed, or the sound has values that are not finite.
    """
    window = _Window(path, media, start_s, length_s, spec, scratch, timeout_s)
    seek_s = start_s - _LEAD_S
    if seek_s > 0 and media.clock_jump_s is None and media.video_index is not None:
        try:
            cut = _cut_from(window, seek_s)
        except SourceFailed as failure:
            if failure.reason is not Reason.CORRUPT:
                raise
        else:
            if not _is_late(cut, window):
                return cut
    return _cut_from(window, 0.0)


@dataclass(frozen=True)
class _Window:
    path: Path
    media: Media
    start_s: float
    length_s: float
    spec: ClipSpec
    scratch: Path
    timeout_s: float


def _picture_step_s(window: _Window) -> float:
    """From one picture to the next, in the file or in the clip, at most a second."""
    return 1 / min(window.spec.fps, max(1.0, window.media.frames_per_s))


def _is_late(cut: Cut, window: _Window) -> bool:
    """Whether there is a first picture or sound before that which was found."""
    picture_late = _is_seen(window) and cut.picture_starts_s > 0
    return picture_late or (_is_heard(window) and (cut.sound is None or cut.sound.starts_s > FILLED_S))


def _is_seen(window: _Window) -> bool:
    """Whether a picture begins before the window's end and lasts for a frame of it or more."""
    first_s, last_s = window.media.picture_s
    return (window.media.video_index is not None and first_s < window.start_s + window.length_s
            and last_s > window.start_s + 1 / window.spec.fps)


def _is_heard(window: _Window) -> bool:
    """Whether there is sound from a little before the window to its end."""
    media, from_s, until_s = window.media, window.start_s - _LEAD_S, window.start_s + window.length_s
    paused = any(begins_s <= from_s and ends_s >= until_s for begins_s, ends_s in media.sound_pauses_s)
    return (media.audio_index is not None and media.sound_s[0] < until_s and media.sound_s[1] > from_s
            and not paused)


def _cut_from(window: _Window, seek_s: float) -> Cut:
    """Cut a window out of the file, decoding from about `seek_s` on."""
    media, spec, scratch = window.media, window.spec, window.scratch
    first_picture = scratch.with_suffix(".first")
    skip_s = window.start_s - seek_s  # from where decoding begins to the window
    seek = {"ss": f"{seek_s:.6f}"} if seek_s > 0 else {}
    source = ffmpeg.input(f"file:{_as_text(window.path.absolute())}", t=f"{skip_s + window.length_s:.6f}", threads=1,
                          max_pixels=_MOST_PIXELS, **seek, **LOOK_AHEAD, **only_this_file())
    outputs = []
    sees, hears = _is_seen(window), _is_heard(window)
    if sees:
        shown = source[str(media.video_index)].filter_multi_output("split")
        pictures = shown[0]
        if seek_s == 0:
            # The file's first picture is held from 0 on. Not by `start_time` of fps: where a stream changes its
            # parameters, ffmpeg makes its filters anew, and they would begin at 0 again.
            latest_s = media.picture_s[0] + 2 * _picture_step_s(window)
            pictures = pictures.filter("setpts", f"if(eq(N,0)*lt(T,{latest_s:.6f}),0,PTS)")
        pictures = pictures.filter("fps", fps=spec.fps)
        if skip_s > 0:  # after fps, which holds a picture until the next: the window may begin in a pause
            pictures = pictures.filter("trim", start=f"{skip_s:.6f}").filter("setpts", f"PTS-{skip_s:.6f}/TB")
        rate = _rate_option()
        outputs.append(ffmpeg.output(_scaled(pictures, spec), _as_text(scratch), **{rate: "cfr"}, **_h264(spec)))
        # In steps of a millisecond; else times would be rounded to the source's own steps.
        outputs.append(ffmpeg.output(shown[1].filter("trim", end_frame=1), _as_text(first_picture), format="framecrc",
                                     enc_time_base="1:1000", **{rate: "passthrough"}))
    lead_s = min(skip_s, _LEAD_S)
    if hears:
        sound = source[str(media.audio_index)]
        if skip_s > lead_s:
            sound = sound.filter("atrim", start=f"{skip_s - lead_s:.6f}")
            sound = sound.filter("asetpts", f"PTS-{skip_s - lead_s:.6f}/TB")
        mixed = sound.filter("aformat", sample_fmts="fltp").filter("pan", _MIXES)
        # NUT keeps the time stamps, which tell where in the clip each piece belongs.
        outputs.append(ffmpeg.output(mixed.filter("aresample", spec.sample_rate_hz), "pipe:1", format="nut",
                                     acodec="pcm_f32le"))
    if not outputs:
        return Cut(None, math.inf, None)
    # A stream that pauses is not to be taken for a new clock: whether there is one is known.
    jump_s = media.clock_jump_s or 1e6
    command = ffmpeg.merge_outputs(*outputs).global_args(
        "-nostdin", "-dts_delta_threshold", f"{jump_s:g}", "-loglevel", "error",
        "-filter_complex_threads", "1", "-max_error_rate", "0")
    try:
        stdout = _run(command.compile(cmd=_as_text(Path(ffmpeg_path())), overwrite_output=True), window)
        mp4 = scratch.read_bytes() if sees else None
        picture_starts_s = max(0.0, _first_time_s(first_picture) - skip_s) if sees else math.inf
    finally:
        scratch.unlink(missing_ok=True)
        first_picture.unlink(missing_ok=True)
    if not hears:
        return Cut(mp4, picture_starts_s, None)
    rate_hz = spec.sample_rate_hz
    found = on_time_line(_pieces(stdout), round(lead_s * rate_hz), round(window.length_s * rate_hz), rate_hz)
    if found is not None and not np.isfinite(found.waveform).all():
        raise SourceFailed("decode", Reason.NOT_FINITE, f"{np.sum(~np.isfinite(found.waveform))} samples of its sound")
    return Cut(mp4, picture_starts_s, found)


def _first_time_s(framecrc: Path) -> float:
    """The time stamp of the first line that ffmpeg's framecrc lists; infinite if it lists none."""
    time_base = Fraction(1)
    for line in framecrc.read_text(encoding="utf-8").splitlines():
        if line.startswith("#tb 0:"):
            time_base = Fraction(line.split()[-1])
        elif not line.startswith("#"):
            return float(int(line.split(",")[2]) * time_base)
    return math.inf


def _pieces(nut: bytes) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The packets of ffmpeg's own output: (sample number of the first, (samples, 2))."""
    try:
        container = av.open(io.BytesIO(nut), "r", format="nut")
    except av.error.FFmpegError:  # a header without packets, or not even that: there is no sound in the window
        return
    with container:
        stream = container.streams.audio[0]
        for packet in container.demux(stream):
            if packet.size and packet.pts is not None and stream.time_base is not None:
                yield (round(packet.pts * stream.time_base * stream.rate),
                       np.frombuffer(bytes(packet), np.float32).reshape(-1, 2))


def _scaled(pictures: ffmpeg.nodes.FilterableStream, spec: ClipSpec) -> ffmpeg.nodes.FilterableStream:
    """Square pixels, short side to the spec (never enlarged), sides even as yuv420p needs them."""
    wide = "iw*if(gt(sar,0),sar,1)"  # sar, the shape of a pixel, is 0 where a file doesn't state it
    shrink = f"min(1,{spec.short_side}/min({wide},ih))"
    width, height = f"max(2,2*round({wide}*{shrink}/2))", f"max(2,2*round(ih*{shrink}/2))"
    return pictures.filter("scale", w=width, h=height, flags="bicubic").filter("setsar", 1)


def _rate_option() -> str:
    """ffmpeg's option for the pace of frames (cfr, passthrough), by its name since 5.1, or the one before."""
    return "vsync" if re.match(r"n?([0-4]|5\.0)\.", ffmpeg_version()) else "fps_mode"


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


def _run(command: list[str], window: _Window) -> bytes:
    spec = window.spec
    picture_bytes = 1.5 * _WIDEST * spec.short_side**2
    # See _as_text.
    arguments = confined([part.encode("latin-1") for part in command],
                         MEMORY_BYTES + _PICTURES_UNDER_WAY * picture_bytes, 1 + _CPU_SHARE * window.timeout_s,
                         _MORE_FILE_BYTES + spec.frames * picture_bytes)
    # A session of its own: Ctrl-C on the terminal reaches avprep alone, not a half-finished clip.
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            stdout, stderr = process.communicate(timeout=window.timeout_s)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise SourceFailed("decode", Reason.TIMEOUT, f"after {window.timeout_s:g} s") from error
    if process.returncode == NOT_STARTED:
        raise AvprepError(f"{ffmpeg_path()} can't be started: {' '.join(_lines(stderr))}")
    if process.returncode in (-signal.SIGXCPU, -signal.SIGXFSZ):
        raise SourceFailed("decode", Reason.TOO_LARGE, "it takes far more time or room than a clip")
    if process.returncode < 0:
        raise SourceFailed("decode", Reason.CRASHED, f"by signal {-process.returncode}; if memory ran out, build again "
                           "with --force and fewer --workers")
    if process.returncode != 0:
        raise _failure(stderr, window.path) or SourceFailed("decode", Reason.CORRUPT,
                                                            f"ffmpeg ended with code {process.returncode}")
    return stdout


def _failure(stderr: bytes, path: Path) -> DiskFull | SourceFailed | None:
    """What ffmpeg says of a failure, as an error of ours; None if it says nothing. The file's name, which may be any
    text, is no part of it."""
    said = _lines(stderr.replace(os.fsencode(path.absolute()), b""))
    if any(line.endswith(_NO_SPACE) for line in said):
        return DiskFull()
    if any(map(_NO_MEMORY.search, said)):
        return SourceFailed("decode", Reason.TOO_LARGE, f"to decode it takes more than {MEMORY_BYTES / 1e9:g} GB")
    lines = _lines(stderr)
    return SourceFailed("decode", Reason.CORRUPT, lines[0].split("] ")[-1][:200]) if lines else None


def _lines(text: bytes) -> list[str]:
    return [line.rstrip() for line in text.decode("utf-8", "replace").splitlines() if line.strip()]


def check_length(picture_s: float, sound_s: float, expected_s: float) -> None:
    """Refuse a clip of which far less was decoded than its container promised.

    Raises:
        SourceFailed: more than a tenth of the window (and more than half a second) is missing from both streams.
    """
    missing_s = expected_s - max(picture_s, sound_s)
    if missing_s > max(MISSING_S, MISSING_SHARE * expected_s) or max(picture_s, sound_s) == 0:
        raise SourceFailed("decode", Reason.TRUNCATED,
                           f"{expected_s - missing_s:.1f} of {expected_s:.1f} s could be decoded")
