"""Scores of videos, from those of their clips and views; and what they are worth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avtrain.data.manifest import ClipRow, video_of
from avtrain.transfer.metrics import Floats, bootstrap_map, bootstrap_means, interval, mean_average_precision, top_k


@dataclass(frozen=True)
class Predictions:
    """One row a video.

    Attributes:
        videos: names.
        labels: classes of each.
        scores: (videos, classes), the mean over all stored clips (by length), views, crops and heads.
    """

    videos: list[str]
    labels: list[list[int]]
    scores: Floats

    def single(self) -> NDArray[np.int64]:
        """(videos,): the one label of each."""
        return np.asarray([labels[0] for labels in self.labels], np.int64)

    def targets(self) -> NDArray[np.bool_]:
        """(videos, classes): which classes each has."""
        targets = np.zeros(self.scores.shape, bool)
        for row, labels in enumerate(self.labels):
            targets[row, labels] = True
        return targets


class ScoreSums:
    """Sums scores of rows by video.

    Args:
        clips: those whose videos are predicted; a video's labels are those of all its clips, and a clip weighs as long
            as it is: the rest of a video, cut off after 30 s, is seen in as many views as the 30 s.
        classes: how many.
    """

    def __init__(self, clips: Iterable[ClipRow], classes: int) -> None:
        self._labels: dict[str, set[int]] = {}
        self._lengths_s: dict[str, float] = {}
        for clip in clips:
            self._labels.setdefault(clip.video, set()).update(clip.labels)
            self._lengths_s[clip.key] = clip.length_s
        self._rows = {video: row for row, video in enumerate(self._labels)}
        self._sums, self._weights = np.zeros((len(self._rows), classes)), np.zeros(len(self._rows))

    def add(self, keys: Sequence[str], scores: Tensor) -> None:
        """Scores, (rows, classes), of views of the clips with these keys; others than were asked for are passed by."""
        for key, row in zip(keys, scores.double().cpu().numpy(), strict=True):
            if key in self._lengths_s:
                at = self._rows[video_of(key)]
                self._sums[at] += self._lengths_s[key] * row
                self._weights[at] += self._lengths_s[key]

    def predictions(self) -> Predictions:
        """What has been seen; videos without a single readable clip are left out."""
        seen = self._weights > 0
        videos = [video for video, row in self._rows.items() if seen[row]]
        return Predictions(videos, [sorted(self._labels[video]) for video in videos],
                           self._sums[seen] / self._weights[seen, None])


@dataclass(frozen=True)
class Metric:
    """A number in percent, and bootstrap draws of it."""

    value: float
    draws: Floats

    def interval(self) -> tuple[float, float]:
        """The 95 % bootstrap interval."""
        return interval(self.draws)


def metrics_of(predictions: Predictions, multi_label: bool, seed: int) -> dict[str, Metric]:
    """top1 and (with more than five classes) top5, or map, in percent."""
    scores = predictions.scores
    if multi_label:
        targets = predictions.targets()
        value = float(mean_average_precision(scores, targets)[0])
        return {"map": Metric(100 * value, 100 * bootstrap_map(scores, targets, seed))}
    labels = predictions.single()
    return {f"top{k}": Metric(100 * float(right.mean()), 100 * bootstrap_means(right, seed))
            for k in (1, 5) if k == 1 or scores.shape[1] > k for right in [top_k(scores, labels, k)]}


def mean_metrics(of_splits: Sequence[dict[str, Metric]]) -> dict[str, Metric]:
    """The mean over splits; its draws are means of the splits' draws, shuffled: with one seed, splits of one size are
    resampled at the same places, and would rise and fall together."""
    means = {}
    for name in of_splits[0]:
        count = min(len(split[name].draws) for split in of_splits)
        means[name] = Metric(float(np.mean([split[name].value for split in of_splits])),
                             np.mean([np.random.default_rng(number).permutation(split[name].draws)[:count]
                                      for number, split in enumerate(of_splits)], 0))
    return means


def targets_of(labels: Sequence[Sequence[int]], classes: int, multi_label: bool) -> Tensor:
    """(rows,) class numbers, or (rows, classes) of 0 and 1 for several labels a row."""
    if not multi_label:
        return torch.tensor([one[0] for one in labels])
    targets = torch.zeros(len(labels), classes)
    for row, several in enumerate(labels):
        targets[row, list(several)] = 1.0
    return targets
