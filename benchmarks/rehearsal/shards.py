"""Folders of shards that together list as many clips as Kinetics-700 gives, and hold a hundredth of that."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from avtrain.data.manifest import MANIFEST, schema
from avtrain.data.shards import FORMAT, FORMAT_VERSION
from benchmarks.gpu.shards import FPS, SEGMENT, SPEC, add_clip

CLIPS_A_SHARD = 164
_FRAMES, _HEIGHT, _WIDTH = 480, 24, 32
_VIDEOS = 8  # that the clips have among them


def make_folders(root: Path, split: str, folders: int, shards: int) -> list[Path]:
    """So many folders, each of so many shards, which all are the same files under other names.

    Args:
        root: where they are made.
        split: their name there, with a number.
        folders: how many.
        shards: of each.
    """
    first = root / f"{split}-000"
    first.mkdir(parents=True)
    random = np.random.default_rng(len(split))
    videos = [_video(random) for _ in range(_VIDEOS)]
    rows: list[dict[str, Any]] = []
    sizes = []
    for number in tqdm(range(shards), f"{split}: shards", leave=False):
        path = first / f"shard-{number:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for clip in range(CLIPS_A_SHARD):
                name = number * CLIPS_A_SHARD + clip
                rows.append(add_clip(tar, name, videos[name % _VIDEOS], _FRAMES) | {"shard": path.name})
        sizes.append(path.stat().st_size)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema()), first / MANIFEST)
    made = [first]
    for number in range(folders):
        folder = root / f"{split}-{number:03d}"
        if number:
            folder.mkdir()
            for path in [*first.glob("*.tar"), first / MANIFEST]:
                os.link(path, folder / path.name)
            made.append(folder)
        # Their checksums tell folders apart, and are looked at where a shard is fetched.
        listed = [{"url": f"shard-{shard:06d}.tar", "nsamples": CLIPS_A_SHARD, "filesize": size,
                   "sha256": hashlib.sha256(f"{split} {number} {shard}".encode()).hexdigest()}
                  for shard, size in enumerate(sizes)]
        index = {"format": FORMAT, "format_version": FORMAT_VERSION, "dataset": "rehearsal", "split": split,
                 "classes": ["one"], "multi_label": False, "spec": SPEC, "shardlist": listed}
        (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    return made


def _video(random: np.random.Generator) -> bytes:
    """A clip of drifting noise, with a key frame every segment, as avprep writes it."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "30", "g": str(SEGMENT), "keyint_min": str(SEGMENT),
                          "sc_threshold": "0", "b_strategy": "0", "x264-params": "b-pyramid=none", "flags": "+cgop"}
        picture = random.integers(30, 200, (_HEIGHT * 3 // 2, _WIDTH), dtype=np.uint8)
        for _ in range(_FRAMES):
            picture = np.roll(picture, 1, 1)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()
