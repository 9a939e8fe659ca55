"""Contact sheets: what is in the shards, at a glance."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from avprep.errors import AvprepError
from avprep.logmel import stored_log_mel
from avprep.manifest import places_of, read_clips
from avprep.mirror import Shards
from avprep.shards import find_indexes, read_index

_FRAMES_ACROSS = 12
_ROW_HEIGHT_IN = 1.9
_WIDTH_IN = 15.0


def contact_sheet(shards: Shards, output: Path, clips: int) -> int:
    """Draw the first clips of each split: frames across the clip over its log-mel, with label and time axis.

    Returns:
        How many clips were drawn.

    Raises:
        AvprepError: no shards there, or the picture's format is unknown.
    """
    from matplotlib.figure import Figure

    paths = find_indexes(shards.folder)
    rows = [sample for number, path in enumerate(paths)
            for sample in _samples(shards, path, clips // len(paths) + (number < clips % len(paths)))]
    if not rows:
        raise AvprepError(f"the shards in {shards.folder} hold no clips")
    figure = Figure(figsize=(_WIDTH_IN, _ROW_HEIGHT_IN * len(rows) + 0.3), dpi=100, layout="constrained")
    grid = figure.add_gridspec(2 * len(rows), 1, height_ratios=[1.15, 0.85] * len(rows), hspace=0.0)
    for number, (row, classes, members) in enumerate(rows):
        length_s = row["end_s"] - row["start_s"]
        top = figure.add_subplot(grid[2 * number])
        names = ", ".join(classes[label] for label in row["labels"] if 0 <= label < len(classes)) or "no label"
        top.set_title(f"{names}   ·   {row['key']}   ·   {row['source']} from {row['start_s']:g} s", loc="left",
                      fontsize=8, pad=2)
        _show(top, _film_strip(members["mp4"], row["frames"]) if "mp4" in members else None, "no picture", length_s)
        bottom = figure.add_subplot(grid[2 * number + 1])
        mel = stored_log_mel(members["logmel.npy"]) if "logmel.npy" in members else None
        _show(bottom, mel, "no sound", length_s, row["sound_s"])
        bottom.set_xticks(np.arange(0, length_s + 1e-6, 2 if length_s > 5 else 0.5))
        bottom.set_xlabel("seconds" if number == len(rows) - 1 else "", fontsize=7)
        bottom.tick_params(axis="x", labelsize=7, length=2, pad=1)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(output)
    except ValueError as error:
        raise AvprepError(f"-o {output}: {error}") from error
    return len(rows)


def _samples(shards: Shards, index_path: Path,
             count: int) -> Iterator[tuple[dict[str, Any], list[str], dict[str, bytes]]]:
    """The row, the classes and the members of the first clips."""
    index, folder = read_index(index_path), index_path.parent
    listed = {entry["url"] for entry in index["shardlist"]}
    for row in read_clips(folder, index).slice(0, count).to_pylist():
        if row["shard"] not in listed:
            raise AvprepError(f"{index_path}: a clip lies in no shard of it: run `avprep verify`")
        yield row, index["classes"], {ending: shards.read_at(folder / row["shard"], *place)
                                      for ending, place in places_of(row).items()}


def _film_strip(mp4: bytes, count: int) -> NDArray[np.uint8]:
    """Evenly spaced frames side by side: (height, n * width, 3). Each stands for its stretch of time."""
    wanted = {int((number + 0.5) * count / _FRAMES_ACROSS) for number in range(_FRAMES_ACROSS)}
    with av.open(io.BytesIO(mp4), "r", format="mp4", metadata_errors="replace") as container:
        frames = [frame.to_ndarray(format="rgb24") for number, frame in enumerate(container.decode(video=0))
                  if number in wanted]
    return np.concatenate(frames, axis=1)


def _show(axes: Any, image: NDArray[Any] | None, absent: str, length_s: float,
          image_s: float | None = None) -> None:
    axes.set_xlim(0, length_s)
    axes.set_yticks([])
    if image is None:
        axes.text(0.5, 0.5, absent, transform=axes.transAxes, ha="center", va="center", color="grey", fontsize=9)
        axes.set_xticks([])
        return
    axes.imshow(image, extent=(0, image_s or length_s, 0, 1), aspect="auto", origin="lower" if image_s else "upper",
                cmap="magma", interpolation="nearest" if image_s else "antialiased")
    axes.set_xlim(0, length_s)
    if image_s is None:
        axes.set_xticks([])
