"""Source -> clips: which windows a file gives, and what is stored of one."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from avprep.datasets.source import Source
from avprep.errors import Reason, SourceFailed
from avprep.logmel import log_mel
from avprep.media import FILLED_S, Cut, check_length, cut_clip
from avprep.probe import Media
from avprep.spec import ClipSpec

_TRIMMED_S = 2.0  # that a file cut to its moment may be longer than it


@dataclass(frozen=True)
class Window:
    """One clip to be made.

    Attributes:
        key: the sample's key in the shard: the source's, and the clip's number within it.
        source: the file.
        media: what it holds.
        start_s: where the clip starts in the file.
        length_s: how long it is at most; less than a full clip at the end of a file.
    """

    key: str
    source: Source
    media: Media
    start_s: float
    length_s: float


@dataclass(frozen=True)
class Clip:
    """One sample of a shard: its key, the bytes of its members by ending, and the content of its `.json`."""

    key: str
    members: dict[str, bytes]
    info: dict[str, Any]


def windows(source: Source, media: Media, spec: ClipSpec) -> list[Window]:
    """The clips that a file gives.

    A file with an annotated moment gives the one full clip around it. Any other gives consecutive full clips, the
    last of them shorter, and kept if it has at least one segment; a file shorter than a segment gives one clip too.

    Raises:
        SourceFailed: the file ends before its annotated moment.
    """
    starts = [_start_around(source.moment_s, media.length_s, spec)] if source.moment_s else [
        number * spec.clip_s for number in range(int(media.length_s // spec.clip_s) + 1)]
    return [Window(f"{source.key}-{number:04d}", source, media, start_s, min(spec.clip_s, media.length_s - start_s))
            for number, start_s in enumerate(starts)
            if number == 0 or media.length_s - start_s >= spec.segment_s]


def _start_around(moment_s: tuple[float, float], length_s: float, spec: ClipSpec) -> float:
    """Where the clip around a moment starts, in a file of that length.

    Raises:
        SourceFailed: the file ends before the moment, and is no trimmed one either.
    """
    if moment_s[0] >= length_s:
        if length_s > moment_s[1] - moment_s[0] + _TRIMMED_S:
            raise SourceFailed("probe", Reason.TRUNCATED,
                               f"it ends at {length_s:.1f} s, before its moment, {moment_s[0]:g} to {moment_s[1]:g} s")
        return 0.0  # the file holds the moment alone: it was trimmed, whatever its name says
    centred = (moment_s[0] + moment_s[1] - spec.clip_s) / 2
    return round(max(0.0, min(centred, length_s - spec.clip_s)), 3)


def make_clip(window: Window, spec: ClipSpec, dataset: str, split: str, scratch: Path, timeout_s: float) -> Clip:
    """Cut one clip out of its file.

    Members: `mp4` (H.264, silent, a keyframe at each segment's start) unless the file has no pictures there,
    `logmel.npy` (mel_bands, frames) float16 unless it has no sound there, and `json`.

    Raises:
        SourceFailed: the file could not be decoded as far as it promised.
    """
    cut = cut_clip(window.source.path, window.media, window.start_s, window.length_s, spec, scratch, timeout_s)
    mp4, sound = cut.mp4, cut.sound
    frames, width, height = _count_frames(mp4) if mp4 else (0, 0, 0)
    sound_s = len(sound.waveform) / spec.sample_rate_hz if sound else 0.0
    check_length(frames / spec.fps, sound_s, window.length_s)
    members: dict[str, bytes] = {}
    if mp4 and frames:
        members["mp4"] = mp4
    mel_frames = 0
    if sound:
        spectrogram = log_mel(sound.waveform, spec).astype(np.float16)
        if not np.isfinite(spectrogram).all():
            raise SourceFailed("decode", Reason.NOT_FINITE, "its sound is too loud for a log-mel")
        mel_frames = spectrogram.shape[1]
        members["logmel.npy"] = _npy(spectrogram)
    info: dict[str, Any] = {
        "key": window.key, "dataset": dataset, "split": split, "source": window.source.name,
        "labels": list(window.source.labels), "start_s": window.start_s,
        "end_s": round(window.start_s + max(frames / spec.fps, sound_s), 4),
        "frames": frames, "width": width, "height": height, "sound_s": round(sound_s, 4), "mel_frames": mel_frames,
        "missing": [name for name, there in (("picture", frames), ("sound", mel_frames)) if not there],
        "marks": _marks(window, cut, frames, spec),
        "spec": spec.to_json()}
    if window.source.label_times_s is not None:
        info |= _labels_inside(window.source.labels, window.source.label_times_s, info["start_s"], info["end_s"])
    members["json"] = json.dumps(info, ensure_ascii=False, sort_keys=True).encode()
    return Clip(window.key, members, info)


def _marks(window: Window, cut: Cut, frames: int, spec: ClipSpec) -> list[str]:
    """What is odd about a clip that is right all the same; shards/README.md lists the words."""
    sound = cut.sound
    found = {"silent": sound is not None and sound.silent,
             "cancels": sound is not None and sound.cancels,
             "hdr": frames > 0 and window.media.hdr,
             "held_frames": frames > 0 and cut.picture_starts_s * spec.fps >= 1,
             "filled_silence": sound is not None and sound.filled_s > FILLED_S}
    return [mark for mark, holds in found.items() if holds]


def _labels_inside(labels: tuple[int, ...], times_s: tuple[tuple[tuple[float, float], ...], ...], start_s: float,
                   end_s: float) -> dict[str, Any]:
    """The labels whose time overlaps the clip; their times count from the clip's start."""
    inside = {label: [round(time_s - start_s, 3) for span in spans if span[0] < end_s and span[1] > start_s
                      for time_s in span] for label, spans in zip(labels, times_s, strict=True)}
    return {"labels": [label for label, times in inside.items() if times],
            "label_times_s": [times for times in inside.values() if times]}


def _count_frames(mp4: bytes) -> tuple[int, int, int]:
    """(frames, width, height) of a video of our own, from its packets."""
    with av.open(io.BytesIO(mp4), "r", format="mp4") as container:
        if not container.streams.video:
            return 0, 0, 0
        stream = container.streams.video[0]
        return sum(packet.size > 0 for packet in container.demux(stream)), stream.width, stream.height


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
