"""What an evaluation leaves behind: predictions, the confusion of classes, numbers, and which code it was."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avtrain.data.manifest import ClipRow
from avtrain.errors import AvtrainError
from avtrain.files import written_whole
from avtrain.transfer.predictions import Metric, Predictions

_NAMES = {"top1": "top-1", "top5": "top-5", "map": "mAP"}


def numbers(of: Mapping[str, Metric]) -> dict[str, Any]:
    """Each figure in percent with its 95 % interval, as JSON has it."""
    return {name: {"percent": round(figure.value, 2), "interval_95": [round(end, 2) for end in figure.interval()]}
            for name, figure in of.items()}


def results_text(results: Mapping[str, Any]) -> str:
    """Lines for people: each split and the mean, with intervals, what was published, and what differs from that."""
    counts = {split: of["videos"] for split, of in results["shards"].items()}
    lines = [f"{results['task']}, {results['protocol']}, {results['modality']}"]
    for split, of_split in results["splits"].items():
        left_out = counts[split]["unreadable"]
        lines.append(f"  split {split}: {_figures_text(of_split)}, {counts[split]['test'] - left_out} videos"
                     + (f" ({left_out} more can't be decoded and are left out)" if left_out else ""))
    if len(results["splits"]) > 1:
        lines.append(f"  mean: {_figures_text(results['mean'])}")
    lines += [f"  validation of split {split}: {_figures_text(of_split)}, {counts[split]['validation']} videos"
              for split, of_split in results["validation"].items()]
    if results["published"]:
        lines.append(f"  published: {_published_text(results)}; {results['source']}")
    if results["differs_from_published"]:
        lines.append(f"  not the published setting: {'; '.join(results['differs_from_published'])}")
    return "\n".join(lines)


def table_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table in Markdown, one line a task."""
    lines = ["", "| task | protocol | modality | splits | ours, 95 % interval | published | source | ours differs in |",
             "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["task"], row["protocol"], row["modality"], str(len(row["splits"])), _figures_text(row["mean"]),
                 _published_text(row), row["source"], "; ".join(row["differs_from_published"])]
        lines.append(f"| {' | '.join(cell or '-' for cell in cells)} |")
    return "\n".join(lines)


def _figures_text(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{_NAMES[name]} {of['percent']:.1f} % ({of['interval_95'][0]:.1f} to {of['interval_95'][1]:.1f})"
                     for name, of in figures.items())


def _published_text(results: Mapping[str, Any]) -> str:
    return ", ".join(f"{_NAMES[name]} {value} %" for name, value in results["published"].items())


def write_predictions(path: Path, predicted: Mapping[str, Predictions]) -> None:
    """One line a video: its split, labels, and the score of each class."""
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for split, found in predicted.items():
            for video, labels, scores in zip(found.videos, found.labels, found.scores, strict=True):
                line = {"split": split, "video": video, "labels": labels, "best": int(scores.argmax()),
                        "scores": [float(f"{score:.7g}") for score in scores]}
                file.write(json.dumps(line) + "\n")


def read_predictions(path: Path) -> Predictions:
    """What `write_predictions` wrote of one split.

    Raises:
        AvtrainError: it is damaged.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = Predictions([str(line["video"]) for line in lines], [list(line["labels"]) for line in lines],
                            np.asarray([line["scores"] for line in lines], np.float64))
        found.targets()
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise AvtrainError(f"{path} is damaged: delete it, and the same command makes it again") from error
    return found


def read_whole_predictions(path: Path, clips: Iterable[ClipRow], classes: int, most_missing: float) -> Predictions:
    """The same, of the videos of these clips.

    Args:
        path: the file.
        clips: those whose videos were predicted.
        classes: how many.
        most_missing: so many of the videos may be missing, as they could not be decoded.

    Raises:
        AvtrainError: it is damaged, or not of these videos and classes.
    """
    found = read_predictions(path)
    labels: dict[str, set[int]] = {}
    for clip in clips:
        labels.setdefault(clip.video, set()).update(clip.labels)
    wrong = [video for video, of_video in zip(found.videos, found.labels, strict=True)
             if video not in labels or sorted(labels[video]) != of_video]
    missing = len(labels) - len(set(found.videos))
    if (wrong or missing > most_missing or len(set(found.videos)) < len(found.videos)
            or found.scores.shape[1:] != (classes,) or not np.isfinite(found.scores).all()):
        raise AvtrainError(f"{path} is not whole: delete it, and the same command makes it again")
    return found


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
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+",
                               "--exclude=*"],
                              capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
