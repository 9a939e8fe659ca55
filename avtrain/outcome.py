"""What an evaluation leaves behind: predictions, the confusion of classes, numbers, and which code it was."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avtrain.files import written_whole
from avtrain.predictions import Figure, Predictions


def numbers(of: Mapping[str, Figure]) -> dict[str, Any]:
    """Each figure in percent with its 95 % interval, as JSON has it."""
    return {name: {"percent": round(figure.value, 2), "interval_95": [round(end, 2) for end in figure.interval()]}
            for name, figure in of.items()}


def write_predictions(path: Path, predicted: Mapping[str, Predictions]) -> None:
    """One line a video: its split, labels, and the score of each class."""
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for split, found in predicted.items():
            for video, labels, scores in zip(found.videos, found.labels, found.scores, strict=True):
                line = {"split": split, "video": video, "labels": labels, "best": int(scores.argmax()),
                        "scores": [float(f"{score:.7g}") for score in scores]}
                file.write(json.dumps(line) + "\n")


def read_predictions(path: Path) -> Predictions:
    """What `write_predictions` wrote of one split."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Predictions([line["video"] for line in lines], [line["labels"] for line in lines],
                       np.asarray([line["scores"] for line in lines], np.float64))


def draw_confusion(path: Path, counts: NDArray[np.int64], classes: Sequence[str]) -> None:
    """Rows: the right class; columns: what it was taken for; shades: share of the row."""
    from matplotlib.figure import Figure as Picture

    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.5 + 0.28 * min(len(classes), 110)
    picture = Picture(figsize=(side, side), layout="constrained")
    axes = picture.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
    axes.set_yticks(range(len(classes)), classes, fontsize=7)
    axes.set_xlabel("predicted")
    axes.set_ylabel("right")
    if len(classes) <= 20:
        for row, column in zip(*counts.nonzero(), strict=True):
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7,
                      color="white" if shares[row, column] > 0.5 else "black")
    with written_whole(path) as temporary:
        picture.savefig(temporary, dpi=100)


def git_commit() -> str:
    """The commit of the checkout that this package runs from, "+" behind it if files differ; "" elsewhere."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+",
                               "--exclude=*"],
                              capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
