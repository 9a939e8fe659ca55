"""What a source has around its clips, by PyAV alone: from the file's start, without seeking or picture filters.

Nothing here is shared with `media`, whose faults it is to find.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from avprep.probe import only_this_file
from avprep.spec import ClipSpec

# A better place for a picture or a sound is looked for as far as this from where it should be.
PICTURE_SEARCH_S, SOUND_SEARCH_S = 3.0, 1.5
_THUMBNAIL_PIXELS = 48
_MOST_PIXELS = 8192 * 8192
# Time stamps that jump by more than this begin a new clock: backwards, or ahead where libav's flag allows for it.
_CLOCK_BACK_S, _CLOCK_AHEAD_S, _CLOCK_MAY_JUMP = 0.1, 60.0, 0x200
# Sound that lies off its place by more than this comes after a gap; by less, time stamps are rounded.
_GAP_S = 0.1
# Picture and sound of one instant lie no further apart in a file than this.
_INTERLEAVED_S = 30.0
_READ_TIMEOUT_S = 30.0


@dataclass
class Around:
    """What a source has around a clip that begins at `start_s`, from its first instant.

    Attributes:
        pictures: time and thumbnail of each, in the order of decoding.
        pieces: sound: the number of the first sample, at the spec's rate, and samples.
        picture_ends_s: the end of its last picture, or anything after the clip.
        sound_ends_s: the same of its sound.
    """

    spec: ClipSpec
    start_s: float
    pictures: list[tuple[float, NDArray[np.uint8]]] = field(default_factory=list)
    pieces: list[tuple[int, NDArray[np.float32]]] = field(default_factory=list)
    picture_ends_s: float = 0.0
    sound_ends_s: float = 0.0

    def __post_init__(self) -> None:
        self.end_s = self.start_s + self.spec.clip_s
        margin_s = max(PICTURE_SEARCH_S, SOUND_SEARCH_S + self.spec.segment_s)
        self.from_s, self.until_s = self.start_s - margin_s, self.end_s + margin_s


def decoded(path: Path, places: list[Around]) -> Iterator[Around]:
    """Fill the places, which come in the order of time, in one pass over a file; each is handed on when it is complete.

    Raises:
        FFmpegError, ValueError: the file can't be read (on), or has nothing that can be decoded.
    """
    waiting = deque(places)
    mixer = _Mixer(waiting[0].spec.sample_rate_hz)
    with av.open(str(path), timeout=_READ_TIMEOUT_S, options=only_this_file(),
                 metadata_errors="replace") as container:
        video = container.streams.best("video")
        if video is not None and video.disposition & av.stream.Disposition.attached_pic:
            video = None  # the cover of a sound file
        streams = [stream for stream in (video, container.streams.best("audio", related=video)) if stream is not None]
        for stream in streams:
            stream.codec_context.flags |= av.codec.context.Flags.output_corrupt  # as ffmpeg has it
            stream.codec_context.options = {"max_pixels": str(_MOST_PIXELS)}
        ends_s = dict.fromkeys((stream.index for stream in streams), 0.0)
        for packet in _on_one_clock(container, streams) if streams else ():
            end_s = ends_s[packet.stream.index]
            for frame in _frames(packet):
                time_s = end_s if frame.time is None else frame.time
                if isinstance(frame, av.VideoFrame):
                    end_s = max(end_s, time_s + float((frame.duration or 0) * (frame.time_base or 0)))
                    _add_picture(waiting, time_s, end_s, frame)
                else:
                    end_s = time_s + frame.samples / frame.sample_rate
                    _add_sound(waiting, mixer.pieces(frame, time_s), mixer.rate_hz)
            ends_s[packet.stream.index] = end_s
            while waiting and (min(ends_s.values()) > waiting[0].until_s
                               or max(ends_s.values()) > waiting[0].until_s + _INTERLEAVED_S):
                yield waiting.popleft()
            if not waiting:
                return
        _add_sound(waiting, mixer.rest(), mixer.rate_hz)
    if not any(ends_s.values()):
        raise ValueError("neither picture nor sound")
    yield from waiting


def _frames(packet: Any) -> list[Any]:
    try:
        return list(packet.decode())
    except av.error.InvalidDataError:  # one packet; what is missing then is seen
        return []


def _on_one_clock(container: av.container.InputContainer, streams: list[Any]) -> Iterator[Any]:
    """Packets whose time counts from the file's first instant, and goes on where the file's clock begins anew."""
    may_jump = bool(container.format.flags & _CLOCK_MAY_JUMP)
    shift_s = None if container.start_time is None else -container.start_time / av.time_base
    ends_s: dict[int, float] = {}
    ahead_s = _CLOCK_AHEAD_S
    for packet in container.demux(streams):
        stamp = packet.dts if packet.dts is not None else packet.pts
        if stamp is None:
            yield packet
            continue
        shift_s = -float(stamp * packet.time_base) if shift_s is None else shift_s
        if packet.dts is not None:  # the time to show it is no measure: pictures come in another order
            time_s = float(packet.dts * packet.time_base) + shift_s
            end_s = ends_s.get(packet.stream.index, time_s)
            if time_s < end_s - _CLOCK_BACK_S or (may_jump and time_s > max(ends_s.values(), default=time_s) + ahead_s):
                ahead_s = min(ahead_s, max(1.0, abs(end_s - time_s) / 2))  # packets of both clocks come mixed
                shift_s += end_s - time_s
                time_s = end_s
            ends_s[packet.stream.index] = time_s + float((packet.duration or 0) * packet.time_base)
            packet.dts += round(shift_s / packet.time_base)
        if packet.pts is not None:
            packet.pts += round(shift_s / packet.time_base)
        yield packet


def _add_picture(waiting: Iterable[Around], time_s: float, end_s: float, frame: av.VideoFrame) -> None:
    small = None
    for around in waiting:
        if around.from_s > time_s:  # and so are all that follow
            return
        around.picture_ends_s = end_s
        if time_s <= around.until_s:
            small = thumbnail(frame) if small is None else small
            around.pictures.append((time_s, small))


def thumbnail(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """A small square in grey, turned upright."""
    small = frame.reformat(_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS, "gray", interpolation="AREA")
    return np.rot90(small.to_ndarray(), round(frame.rotation / 90))


def _add_sound(waiting: Iterable[Around], pieces: Iterable[tuple[int, NDArray[np.float32]]], rate_hz: int) -> None:
    for at, piece in pieces:
        ends_s = (at + len(piece)) / rate_hz
        for around in waiting:
            if around.from_s > ends_s:
                break
            around.sound_ends_s = ends_s
            if at <= around.until_s * rate_hz:
                around.pieces.append((at, piece))


class _Mixer:
    """Frames of sound -> (number of the first sample, mean of the channels) at one rate.

    What belongs together is resampled in one run; a gap or a change of the stream's parameters begins another.
    """

    def __init__(self, rate_hz: int) -> None:
        self.rate_hz = rate_hz
        self._resampler: av.AudioResampler | None = None
        self._kind: tuple[Any, ...] = ()
        self._at, self._next_s = 0, 0.0

    def pieces(self, frame: av.AudioFrame, time_s: float) -> Iterator[tuple[int, NDArray[np.float32]]]:
        kind = frame.format.name, frame.layout.name, frame.sample_rate
        if kind != self._kind or abs(time_s - self._next_s) > _GAP_S:
            yield from self.rest()
            # Interleaved: PyAV 18 crashes at more than eight planes.
            self._resampler = av.AudioResampler("flt", frame.layout, self.rate_hz)
            self._kind, self._at, self._next_s = kind, round(time_s * self.rate_hz), time_s
        self._next_s += frame.samples / frame.sample_rate
        yield from self._resampled(frame)

    def rest(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """What the last run still holds back."""
        if self._resampler:
            yield from self._resampled(None)
            self._resampler = None

    def _resampled(self, frame: av.AudioFrame | None) -> Iterator[tuple[int, NDArray[np.float32]]]:
        assert self._resampler is not None
        for made in self._resampler.resample(frame):
            if made is not None and made.samples:
                yield self._at, made.to_ndarray().reshape(made.samples, -1).mean(axis=1)
                self._at += made.samples
