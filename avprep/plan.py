"""Sources -> the windows to cut, grouped into shards. A pure function of the files, the labels and the spec."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from avprep import __version__
from avprep.clips import Window
from avprep.media import ffmpeg_version
from avprep.spec import FORMAT_VERSION, ClipSpec

# Seen on the videos of tests and README at short side 160, 16 fps, crf 23: 2 to 22 kB a second.
_PICTURE_BYTES_PER_S = 18_000
_TAR_BYTES_PER_CLIP = 4_000


@dataclass(frozen=True)
class ShardTask:
    """The windows of one shard, and a fingerprint of all that its bytes depend on."""

    number: int
    windows: tuple[Window, ...]
    fingerprint: str


def shuffled_rank(key: str) -> bytes:
    """Sorting by this mixes classes and videos over the shards, the same way on any machine."""
    return hashlib.sha1(key.encode()).digest()


def shard_tasks(windows: Iterable[Window], spec: ClipSpec, dataset: str, split: str,
                shard_bytes: int) -> list[ShardTask]:
    """Group the windows, in shuffled order, into shards of about `shard_bytes`."""
    groups: list[list[Window]] = []
    room = 0.0
    for window in sorted(windows, key=lambda window: shuffled_rank(window.key)):
        size = _expected_bytes(window, spec)
        if size > room or not groups:
            groups.append([])
            room = shard_bytes
        groups[-1].append(window)
        room -= size
    return [ShardTask(number, tuple(group), _fingerprint(group, spec, dataset, split))
            for number, group in enumerate(groups)]


def _expected_bytes(window: Window, spec: ClipSpec) -> float:
    bytes_per_s = 0.0
    if window.media.audio_index is not None:
        bytes_per_s += 2 * spec.mel_bands * spec.mel_frames / spec.segment_s
    if window.media.video_index is not None:
        ours = _PICTURE_BYTES_PER_S * (spec.short_side / 160) ** 2 * (spec.fps / 16) * 2 ** ((23 - spec.crf) / 6)
        bytes_per_s += min(ours, window.media.bits_per_s / 8 or ours)
    return _TAR_BYTES_PER_CLIP + bytes_per_s * window.length_s


def _fingerprint(windows: list[Window], spec: ClipSpec, dataset: str, split: str) -> str:
    content = [FORMAT_VERSION, __version__, ffmpeg_version(), spec.to_json(), dataset, split, [
        [window.key, window.source.name, _size_bytes(window.source.path), window.start_s, window.length_s,
         window.source.labels, window.source.label_times_s] for window in windows]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone since its header was read: its clips fail, with the reason
        return -1
