"""What is transferred to: one table of tasks (shards, splits, modality, published numbers)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A dataset to transfer to.

    Attributes:
        dataset: folder of its shards.
        splits: name of a split or fold -> splits to train on and to test on.
        modality: what the published model sees of it: visual, audio or both.
        protocol: the published one: finetune or linear.
        classes: how many the whole dataset has; 0: any.
        fps: frames a second of the published views; 0: open, or no pictures.
        test_videos: how many the official test part of a split has, where that is known.
        group: pattern of the part of a key that belongs together: a validation part never splits it; "": the source.
        published: figure -> number in percent, from `source`.
        source: where the published numbers stand.
    """

    dataset: str
    splits: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
    modality: str
    protocol: str
    classes: int = 0
    group: str = ""
    published: dict[str, float] = dataclasses.field(default_factory=dict)
    source: str = ""
    fps: int = 0
    test_videos: Mapping[str, int] = dataclasses.field(default_factory=dict)


_Splits = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
_FOLDS = tuple(f"fold{number}" for number in range(1, 6))
_ESC_SPLITS: _Splits = {fold[-1]: (tuple(other for other in _FOLDS if other != fold), (fold,)) for fold in _FOLDS}
_ESC_RECORDING = r"\d-\d+"  # fold and Freesound recording, without the take
_RELEASE = "README of the authors' release (their best epoch on the test split)"

_UCF_SPLITS: _Splits = {number: ((f"train{number}",), (f"test{number}",)) for number in "123"}

TASKS: dict[str, Task] = {
    "ucf101": Task("ucf101", _UCF_SPLITS, "visual", "finetune", 101,
                   r"v_\w+_g\d+(?=_c\d)", {"top1": 87.5, "top5": 97.4}, _RELEASE, 15,
                   {"1": 3783, "2": 3734, "3": 3696}),
    "esc50": Task("esc50", _ESC_SPLITS, "audio", "linear", 50, _ESC_RECORDING, {"top1": 85.9, "top5": 96.9}, _RELEASE,
                  test_videos=dict.fromkeys(_ESC_SPLITS, 400)),
    "esc10": Task("esc10", _ESC_SPLITS, "audio", "linear", 10, _ESC_RECORDING),
    "kinetics-sounds": Task("kinetics-sounds", {"1": (("train",), ("test",))}, "both", "finetune", 32,
                            published={"top1": 85.8, "top5": 97.8}, source=_RELEASE, fps=15),
    "charades": Task("charades", {"1": (("train",), ("test",))}, "both", "finetune", 157),
    "audioset": Task("audioset", {"1": (("balanced_train",), ("eval",))}, "both", "finetune", 527),
    "demo": Task("demo", {"1": (("train",), ("test",))}, "both", "finetune", 8),
    "folder": Task("folder", {"1": (("train",), ("test",)), "val": (("train",), ("val",))}, "both", "finetune"),
}
