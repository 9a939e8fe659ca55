"""Do shards hold what their index and their rows say?"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np

from avprep.errors import AvprepError
from avprep.logmel import stored_log_mel
from avprep.manifest import CLIPS, SOURCES, clip_row, read_clips, read_sources
from avprep.mirror import Shards
from avprep.progress import progress
from avprep.shards import Sample, read_index, read_samples

_BLOCK_BYTES = 1 << 20


def problems_of(index_path: Path, shards: Shards | None = None) -> Iterator[str]:
    """Check every shard of an index; yields one line a problem, with the shard's name. `shards`: that the index is one
    of, where they are not all on this machine."""
    index, folder = read_index(index_path), index_path.parent
    shards = shards or Shards(folder)
    try:
        clips = read_clips(folder, index)
        sources = read_sources(folder, index)
    except AvprepError as error:
        yield str(error)
        return
    at = 0
    for entry in progress(index["shardlist"], "verify", "shard", len(index["shardlist"])):
        rows = clips.slice(at, entry["nsamples"])
        at += entry["nsamples"]
        shard = folder / entry["url"]
        with shards.whole(shard):
            if not shard.is_file():
                yield f"{shard}: missing"
                continue
            if _sha256(shard) != entry["sha256"]:
                yield f"{shard}: its checksum differs from the index"
            yield from _problems_of_shard(shard, rows.to_pylist(), index["spec"])
    counts = index["counts"]
    if not at == clips.num_rows == counts["clips"]:
        yield (f"{index_path}: the shards have {at} clips, {CLIPS} {clips.num_rows}, the index counts "
               f"{counts['clips']}")
    if sources.num_rows != counts["sources_found"]:
        yield f"{index_path}: {SOURCES} has {sources.num_rows} sources, the index counts {counts['sources_found']}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):  # hashlib.file_digest came with Python 3.11
            digest.update(block)
    return digest.hexdigest()


def _problems_of_shard(shard: Path, rows: list[dict[str, Any]], spec: dict[str, Any]) -> Iterator[str]:
    found = 0
    try:
        for sample in read_samples(shard):
            row = rows[found] if found < len(rows) else None
            found += 1
            if problem := _problem_of_row(shard.name, sample, row) or _problem_of_sample(sample.members, spec):
                yield f"{shard}: {sample.key}: {problem}"
    except AvprepError as error:
        yield str(error)
    if found != len(rows):
        yield f"{shard}: {found} clips, the index says {len(rows)}"


def _problem_of_row(shard: str, sample: Sample, row: dict[str, Any] | None) -> str | None:
    """Where a sample is not what its row says, if anywhere."""
    try:
        is_right = clip_row(json.loads(sample.members["json"]), shard, sample.places)
    except (KeyError, ValueError, AttributeError, RecursionError):
        return "it has no readable json"
    different = [name for name, value in is_right.items() if row is None or row[name] != value]
    return f"its row in {CLIPS} says otherwise: {', '.join(different)}" if different else None


def _problem_of_sample(members: dict[str, bytes], spec: dict[str, Any]) -> str | None:
    """What is wrong with a sample, if anything."""
    try:
        info = json.loads(members["json"])
        if info["spec"] != spec:
            return "its spec is not the index's"
        if ("mp4" in members) != (info["frames"] > 0) or ("logmel.npy" in members) != (info["mel_frames"] > 0):
            return f"it has the members {', '.join(members)}, against its json"
        if "mp4" in members and (problem := _problem_of_video(members["mp4"], info["frames"], spec)):
            return problem
        if "logmel.npy" in members:
            spectrogram = stored_log_mel(members["logmel.npy"])
            if spectrogram.shape != (spec["mel_bands"], info["mel_frames"]):
                return f"its log-mel is {spectrogram.dtype} {spectrogram.shape}"
            if not np.isfinite(spectrogram).all():
                return "its log-mel has values that are not finite"
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        return f"unreadable: {error}"
    return None


def _problem_of_video(mp4: bytes, frames: int, spec: dict[str, Any]) -> str | None:
    try:
        with av.open(io.BytesIO(mp4), "r", format="mp4", metadata_errors="replace") as container:
            keyframes = [frame.key_frame for frame in container.decode(video=0)]
    except av.error.FFmpegError as error:
        return f"its video can't be decoded: {error.strerror}"
    if len(keyframes) != frames:
        return f"{len(keyframes)} frames can be decoded, its json says {frames}"
    if not all(keyframes[:: spec["segment_frames"]]):
        return "a segment does not start with a keyframe"
    return None
