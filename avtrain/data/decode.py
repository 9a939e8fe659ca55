"""Members of a sample -> arrays: pictures as YUV planes, the log-mel as it was stored."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from avtrain.errors import in_a_line

_BT709 = 1  # colour space in ffmpeg's numbering
_FRAMES_AT_ONCE = 32
# An mp4 and nothing else: libav also knows lists of other files, which it would open.
_OPENED: dict[str, Any] = {"format": "mp4", "metadata_errors": "replace"}
_NPY_HEADER = re.compile(rb"\x93NUMPY\x01\x00..\{'descr': '<f2', 'fortran_order': (?P<order>True|False), "
                         rb"'shape': \((?P<mels>\d{1,9}), (?P<frames>\d{1,9})\), \} *\n", re.DOTALL)
_PIXELS, _MOST_PIXELS = ("yuv420p", "yuvj420p"), 1 << 25  # 8K


class ClipUnreadable(Exception):
    """A sample whose members can't be decoded, and why."""


@dataclass(frozen=True)
class Planes:
    """Frames of a clip in YUV 4:2:0, limited range: luma (frames, height, width), chroma (frames, 2, height / 2,
    width / 2), uint8; `bt709` tells the colour matrix."""

    luma: NDArray[np.uint8]
    chroma: NDArray[np.uint8]
    bt709: bool


def _checked(container: Any) -> Any:
    """The video stream of a stranger's mp4, which decodes no other pictures than the format has.

    Raises:
        ClipUnreadable: it is of another kind.
        IndexError: there is none.
    """
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None or context.name != "h264" or context.pix_fmt not in _PIXELS:
        raise ClipUnreadable("its video is not H.264 in yuv420p")
    context.options = {"max_pixels": str(_MOST_PIXELS)}
    return stream


def decode_frames(mp4: bytes, step: int, first: int = 0, last: int | None = None, references: bool = False) -> Planes:
    """Every `step`-th frame of [first, last), by one thread and without conversion.

    Decoding starts at the keyframe before `first`. With `references`, these frames are known to be among those that
    others are predicted from, and the others are not decoded.

    Raises:
        ClipUnreadable: the bytes are no video, or hold no such frame.
    """
    parts = list(decode_parts(mp4, _FRAMES_AT_ONCE, step, first, last, references))
    return Planes(np.concatenate([part.luma for part in parts]), np.concatenate([part.chroma for part in parts]),
                  parts[0].bt709)


def decode_parts(mp4: bytes, size: int, step: int, first: int = 0, last: int | None = None,
                 references: bool = False) -> Iterator[Planes]:
    """What `decode_frames` gives, `size` frames at a time, the last ones maybe fewer.

    30 s at once are 25 MB, which take longer to get from the system than to fill.

    Raises:
        ClipUnreadable: as `decode_frames`.
    """
    count, part = 0, None
    try:
        with av.open(io.BytesIO(mp4), "r", **_OPENED) as container:
            stream = _checked(container)
            stream.thread_type = "NONE"
            if references:
                stream.codec_context.skip_frame = "NONREF"
            if not stream.average_rate or stream.time_base is None:
                raise ClipUnreadable("its video has no frame rate")
            ticks_per_frame = float(1 / (stream.average_rate * stream.time_base))
            if first:
                container.seek(round(first * ticks_per_frame), stream=stream)
            for frame in container.decode(stream):
                if frame.pts is None:
                    raise ClipUnreadable("its video has frames without a time")
                number = round(frame.pts / ticks_per_frame)
                if last is not None and number >= last:
                    break
                if number >= first and (number - first) % step == 0:
                    y, u, v = (_plane(plane) for plane in frame.planes)
                    if part is None:
                        part = Planes(np.empty((size, *y.shape), np.uint8), np.empty((size, 2, *u.shape), np.uint8),
                                      frame.colorspace == _BT709)
                    # Copied: the decoder reuses its memory.
                    part.luma[count % size], part.chroma[count % size, 0], part.chroma[count % size, 1] = y, u, v
                    count += 1
                    if count % size == 0:
                        yield part
                        part = None
    except av.error.FFmpegError as error:
        raise ClipUnreadable(f"its video can't be decoded: {error.strerror}") from error
    except IndexError as error:
        raise ClipUnreadable("its video has no pictures") from error
    if part is not None:
        yield Planes(part.luma[:count % size], part.chroma[:count % size], part.bt709)
    if not count:
        raise ClipUnreadable("its video has no such frames")


def decode_rgb(mp4: bytes) -> NDArray[np.uint8]:
    """All frames, (frames, height, width, 3).

    Raises:
        ClipUnreadable: the bytes are no video.
    """
    try:
        with av.open(io.BytesIO(mp4), "r", **_OPENED) as container:
            _checked(container)
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise ClipUnreadable(f"its video can't be decoded: {in_a_line(error)}") from error


def _plane(plane: Any) -> NDArray[np.uint8]:
    """The plane without the padding of its lines: (height, width), a view of the decoder's memory."""
    lines: NDArray[np.uint8] = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    picture: NDArray[np.uint8] = lines[:plane.height, :plane.width]
    return picture


def decode_log_mel(content: bytes) -> NDArray[np.float16]:
    """(mels, frames) float16.

    Raises:
        ClipUnreadable: not such an array, or not all of it is finite.
    """
    # Not by numpy: its reader takes what the header asks for before it looks at what there is, and runs a parser on it.
    header = _NPY_HEADER.match(content)
    if header is None:
        raise ClipUnreadable(f"its log-mel is no array of float16 in two dimensions, but {content[:80]!r}")
    by_columns, *shape = header["order"] == b"True", int(header["mels"]), int(header["frames"])
    if 2 * math.prod(shape) != len(content) - header.end():
        raise ClipUnreadable(f"its log-mel can't be read: {len(content)} bytes for {shape[0]} x {shape[1]} values")
    array: NDArray[np.float16] = np.frombuffer(content, np.float16, offset=header.end()).reshape(
        shape, order="F" if by_columns else "C").copy()
    if not np.isfinite(array).all():
        raise ClipUnreadable("its log-mel holds values that are not finite")
    return array
