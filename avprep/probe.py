"""What a file holds, by its headers and packets: streams, length, clock. Nothing is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import av

from avprep.errors import Reason, SourceFailed

_TIMEOUT_S = 30.0
# A stream may begin late in the file: so far is read on for one that formats without a list of streams don't name.
LOOK_AHEAD = {"analyzeduration": str(60_000_000), "probesize": str(50_000_000)}  # microseconds, bytes
# Formats whose files name others, or places in the network, which a stranger's file is not to do. Those that have no
# file of their own (devices, numbered pictures) are known by libav's flag.
_NAME_OTHERS = frozenset({"concat", "hls", "applehttp", "dash", "webm_dash_manifest", "imf", "sdp", "mlv", "vobsub",
                          "avisynth", "vapoursynth", "dvdvideo", "svg_pipe"})
# What lacks more than this of what was promised was cut off in download.
MISSING_SHARE, MISSING_S = 0.1, 0.5
# A length in the headers that is this near to that of the packets is the better one: packets of sound overhang.
SAME_LENGTH_S = 0.1
# Time stamps that jump back by more than this, or (where the format allows for it) so far ahead of all streams, are a
# new clock's. Where there is one, packets of the old and the new clock come mixed: then half a jump ahead is one too.
_CLOCK_BACK_S, _CLOCK_AHEAD_S, _CLOCK_NEAREST_S = 0.1, 60.0, 1.0
_PAUSE_S = 1.0  # of sound
# A file that claims more would give clips without end: in all, and for each of its packets.
_LONGEST_S, _SPARSEST_S = 7 * 86_400.0, 600.0
_WAV_HEAD_BYTES, _WAV_UNKNOWN = 1 << 16, 0x7FFFFFFF
# libav's flags of a format: there is no file, or it is not opened for it; positions are found by reading from the
# start; the clock may begin anew.
_NO_FILE, _GENERIC_INDEX, _CLOCK_MAY_JUMP = 0x1, 0x100, 0x200
_HDR_TRANSFERS = frozenset({16, 18})  # PQ (SMPTE 2084) and HLG (ARIB B67), as ITU-T H.273 numbers them


@dataclass(frozen=True)
class Media:
    """What a file holds: its length and the streams that belong together.

    Attributes:
        length_s: from the file's first instant to the end of the longer chosen stream.
        video_index: the best video stream, as its number in the file; None without pictures.
        audio_index: the sound that goes with it; None without sound.
        bits_per_s: of the whole file; 0 where unknown.
        promised_s: the length that the container states; None where it states none.
        broken_off: the container states more than came, and not as an estimate: the file was cut off in download.
        clock_jump_s: where its time stamps begin anew in the middle, so that one time names two places: a step ahead of
            more than this is another clock's. None for all other files.
        picture_s, sound_s: when the first picture (sound) begins and the last one ends, from the file's first instant.
        sound_pauses_s: from when to when it has no sound, where that is more than a second.
        frames_per_s: pictures for each second, counted; 0 without pictures.
        hdr: pictures of high dynamic range (PQ or HLG).
    """

    length_s: float
    video_index: int | None
    audio_index: int | None
    bits_per_s: int
    promised_s: float | None = None
    broken_off: bool = False
    clock_jump_s: float | None = None
    picture_s: tuple[float, float] = (0.0, 0.0)
    sound_s: tuple[float, float] = (0.0, 0.0)
    sound_pauses_s: tuple[tuple[float, float], ...] = ()
    frames_per_s: float = 0.0
    hdr: bool = False


@lru_cache(maxsize=1)
def only_this_file() -> dict[str, str]:
    """libav's options for a stranger's file: no format that opens others is as much as tried, nor any protocol."""
    formats = []
    for name in sorted(av.formats_available - _NAME_OTHERS):
        with suppress(ValueError):  # one that is written only
            if not av.ContainerFormat(name, "r").flags & _NO_FILE:
                formats.append(name)
    return {"protocol_whitelist": "file", "format_whitelist": ",".join(formats)}


def probe(path: Path) -> Media:
    """Read a file's headers, and on to its last packet, decoding nothing: headers' lengths are not trusted.

    Raises:
        SourceFailed: empty, unreadable, without a stream, or of no length.
        MemoryError: it takes more than this process may have.
    """
    if path.stat().st_size == 0:
        raise SourceFailed("probe", Reason.EMPTY)
    try:
        with av.open(str(path), timeout=_TIMEOUT_S, options={**only_this_file(), **LOOK_AHEAD},
                     metadata_errors="replace") as container:
            video = _best_video(container)
            audio = container.streams.best("audio", related=video)
            streams = [stream for stream in (video, audio) if stream is not None]
            if not streams:
                raise SourceFailed("probe", Reason.NO_STREAMS)
            stated_s = _wav_promised_s(path)
            promised_s = stated_s or _promised_s(container, streams)
            counted = _count_packets(container, streams)
            length_s = promised_s
            if length_s is None or abs(counted.length_s - length_s) > SAME_LENGTH_S:
                length_s = counted.length_s
            broken_off = counted.broken or (stated_s is not None and _lacks(stated_s, length_s)) or (
                counted.jump_s is None and _is_broken_off(container, promised_s, length_s))
            media = Media(length_s, video.index if video else None, audio.index if audio else None,
                          container.bit_rate or 0, promised_s, broken_off, counted.jump_s,
                          counted.span_of(video), counted.span_of(audio), tuple(counted.sound_pauses_s),
                          counted.frames / length_s if length_s > 0 else 0.0,
                          video is not None and _is_hdr(video))
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        reason = Reason.TIMEOUT if isinstance(error, av.error.ExitError) else Reason.UNREADABLE
        # What libav says where it knows the format, and may not read it.
        is_refused = isinstance(error, av.error.ArgumentError)
        raise SourceFailed("probe", reason, "a list of other files" if is_refused else error.strerror or "") from error
    if media.length_s <= 0:
        raise SourceFailed("probe", Reason.NO_LENGTH)
    if not media.length_s <= min(_LONGEST_S, _SPARSEST_S * counted.packets):
        raise SourceFailed("probe", Reason.UNTIMED, f"{counted.packets} packets in {media.length_s / 3600:.0f} hours")
    return media


def _best_video(container: av.container.InputContainer) -> av.video.stream.VideoStream | None:
    best = container.streams.best("video")
    # A cover picture in a sound file is no video.
    if best is None or best.disposition & av.stream.Disposition.attached_pic:
        return None
    assert isinstance(best, av.video.stream.VideoStream)
    return best


def _is_hdr(video: av.video.stream.VideoStream) -> bool:
    # There is no context where this libav has no decoder.
    return video.codec_context is not None and video.codec_context.color_trc in _HDR_TRANSFERS


def _promised_s(container: av.container.InputContainer, streams: list[av.stream.Stream]) -> float | None:
    start_s = (container.start_time or 0) / av.time_base
    ends_s = [float(((stream.start_time or 0) + stream.duration) * stream.time_base) - start_s
              for stream in streams if stream.duration is not None and stream.time_base is not None]
    if len(ends_s) == len(streams):
        return max(ends_s)
    if container.duration is None:
        return None
    # Matroska's length counts from 0 wherever the first time stamp is.
    return container.duration / av.time_base - (start_s if start_s > 1 and "matroska" in container.format.name else 0)


def _wav_promised_s(path: Path) -> float | None:
    """What the header of a .wav says, where that is more than the file has: libav counts only what is there."""
    with path.open("rb") as file:
        head = file.read(_WAV_HEAD_BYTES)
    data, form = head.find(b"data", 12), head.find(b"fmt ", 12)
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE" or min(data, form) < 0 or data + 8 > len(head):
        return None
    size, bytes_per_s = (int.from_bytes(head[at:at + 4], "little") for at in (data + 4, form + 16))
    # Recorders that were never stopped leave 0 or the most that the field holds.
    stated = 0 < size < _WAV_UNKNOWN and bytes_per_s > 0 and data + 8 + size > path.stat().st_size
    return size / bytes_per_s if stated else None


def _is_broken_off(container: av.container.InputContainer, promised_s: float | None, length_s: float) -> bool:
    """Whether less came than a header promised that knew. Not one: a length guessed from the first packets' bit rate
    (bare mp3, AAC and the like), and an mp4's, all of whose packets its tables list."""
    if promised_s is None or container.format.flags & _GENERIC_INDEX or "mp4" in container.format.name.split(","):
        return False
    return _lacks(promised_s, length_s)


def _lacks(promised_s: float, length_s: float) -> bool:
    return promised_s - length_s > max(MISSING_S, MISSING_SHARE * promised_s)


@dataclass
class _Counted:
    length_s: float = 0.0
    frames: int = 0
    packets: int = 0
    jump_s: float | None = None
    broken: bool = False  # reading ended with an error
    sound_pauses_s: list[tuple[float, float]] = field(default_factory=list)
    spans_s: dict[int, tuple[float, float]] = field(default_factory=dict)  # by the stream's number

    def span_of(self, stream: av.stream.Stream | None) -> tuple[float, float]:
        """The stream's first instant and its last."""
        return (0.0, 0.0) if stream is None else self.spans_s.get(stream.index, (0.0, 0.0))


def _count_packets(container: av.container.InputContainer, streams: list[av.stream.Stream]) -> _Counted:
    """The length by the chosen streams' packets. Where the clock jumps back, or far ahead in a format whose clock may
    (as a joined transport stream's), time goes on from there, as ffmpeg has it.

    Raises:
        SourceFailed: bare AAC whose sample rate changes, so that nothing tells the time of what follows.
    """
    counted = _Counted()
    may_jump = bool(container.format.flags & _CLOCK_MAY_JUMP)
    start_s = None if container.start_time is None else container.start_time / av.time_base
    last_s: dict[int, float] = {}  # the end of each stream so far, by its own clock
    rates: set[int] = set()
    for packet in _packets(container, streams, counted):
        assert packet.time_base is not None
        if container.format.name == "aac":
            rates.add(bytes(packet)[2] >> 2 & 0xF if packet.size > 2 else 0)
            if len(rates) > 1:
                raise SourceFailed("probe", Reason.UNTIMED, "bare AAC whose sample rate changes")
        duration_s = float((packet.duration or 0) * packet.time_base)
        show_s = None if packet.pts is None else float(packet.pts * packet.time_base)
        if packet.dts is not None or show_s is None:  # only decoding's order tells a new clock
            before_s = last_s.get(packet.stream_index)
            # Bare streams count nothing but durations.
            decode_s = before_s or start_s or 0.0 if packet.dts is None else float(packet.dts * packet.time_base)
            start_s = decode_s if start_s is None else start_s
            ahead_s = counted.jump_s or _CLOCK_AHEAD_S
            if before_s is not None and (decode_s < before_s - _CLOCK_BACK_S
                                         or (may_jump and decode_s > max(last_s.values()) + ahead_s)):
                jump_s = decode_s - before_s
                counted.jump_s = min(ahead_s, max(_CLOCK_NEAREST_S, abs(jump_s) / 2))
                start_s += jump_s  # all that is later counts from the new clock
                last_s = {index: end_s + jump_s for index, end_s in last_s.items()}
            last_s[packet.stream_index] = decode_s + duration_s
            show_s = decode_s if show_s is None else show_s
        start_s = show_s if start_s is None else start_s
        end_s = show_s + duration_s - start_s
        counted.length_s = max(counted.length_s, end_s)
        first_s, last_end_s = counted.spans_s.get(packet.stream_index, (show_s - start_s, end_s))
        if packet.stream.type == "audio" and show_s - start_s > last_end_s + _PAUSE_S:
            counted.sound_pauses_s.append((last_end_s, show_s - start_s))
        counted.spans_s[packet.stream_index] = (first_s, max(last_end_s, end_s))  # the first picture is a keyframe
        counted.packets += 1
        counted.frames += packet.stream.type == "video"
    return counted


def _packets(container: av.container.InputContainer, streams: list[av.stream.Stream],
             counted: _Counted) -> Iterator[av.packet.Packet[Any]]:
    """The packets of these streams; an error on the way, after some, is the file's end."""
    try:
        for packet in container.demux(streams):
            if packet.size and packet.time_base is not None:
                yield packet
    except av.error.FFmpegError:
        if not counted.spans_s:
            raise
        counted.broken = True
