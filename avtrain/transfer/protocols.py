"""How a task is learned and tested: finetune, linear, knn. Each has settings of its own, and no others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from avtrain.config import parse_override
from avtrain.fields import Amount, Count, Probability, Range, Share, Whole, check, check_fields, section_values
from avtrain.transfer.tasks import TASKS

HINGE_MARGIN = 0.1

_ViewCount = Annotated[int, Range(at_least=1, at_most=1000)]


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What every protocol sees of a video."""

    train_views: _ViewCount = 10
    """Evenly spaced clips of a video in training."""
    test_views: _ViewCount = 10
    """Evenly spaced clips of a video in the test."""
    test_crops: Literal[1, 3] = 3
    """Crops of each: 1, the centre; 3, left/centre/right or top/centre/bottom. Pictures only."""
    test_whole: bool = True
    """The test's squares are the whole short side, data.scale[0] pixels, as published; false: its centre, data.crop
    pixels as in training. A small network on small pictures may not know a square that is a seventh larger."""

    def __post_init__(self) -> None:
        check_fields(self, "transfer")
        check(self.test_whole or self.test_crops == 1, "transfer.test_crops", self.test_crops, "1 without test_whole")


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """What is trained by Adam; weight decay is its L2 term, and 0 on norms. Rates end at 0."""

    epochs: Count
    """Times that every view of the training clips is seen."""
    batch_size: Count
    """Rows of an optimiser step: videos with `sequence`, else views of them."""
    head_rate: Annotated[float, Range(above=0, at_most=100)]
    """Learning rate of the heads at the start."""
    weight_decay: Amount = 5e-6
    """L2 term of Adam, on all but norms."""
    adam_eps: Amount = 1e-8
    """Adam's epsilon."""
    dropout: Probability = 0.5
    """Before the heads' linear layers."""
    loss: Literal["cross_entropy", "hinge", "binary"] = "cross_entropy"
    """cross_entropy, hinge (multi-class, margin 0.1) or binary (a sigmoid a class)."""
    label_smoothing: Probability = 0.0
    """Of cross_entropy."""


@dataclass(frozen=True, kw_only=True)
class _Frozen:
    """What judges the features of a network that stays as it is."""

    sequence: ClassVar[bool] = False
    standardize: bool = False
    """Features are scaled to zero mean and unit std over the training clips."""


@dataclass(frozen=True, kw_only=True)
class Finetune(_Seen, _Trained):
    """The network and new heads are trained; the rates rise, then fall along a cosine."""

    name: ClassVar[str] = "finetune"
    backbone_rate: Amount
    """Learning rate of the networks below the heads."""
    warmup: Probability = 0.0
    """Share of the steps in which the rates rise."""
    sequence: bool = False
    """The clips of a video go through the Transformers together, with the second head on their outputs."""
    random_start: bool = False
    """In training, one clip of a video an epoch instead, starting anywhere."""
    frequency_mask: Share = 0.05
    """Largest share of the mel bands that is masked in training."""
    time_mask: Share = 0.05
    """Largest share of a clip's time that is masked in training."""
    equalizer: Amount = 0.0
    """In training, every clip's sound goes through a random filter: std of its gains, in nats."""
    frequency_shift: Whole = 0
    """In training, sound is shifted by up to so many mel bands."""
    micro_batch: Count | None = None
    """Clips that are computed at once, one such part of a batch after the other, to save memory; none: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.micro_batch or self.batch_size
        check(self.batch_size % size == 0, "transfer.micro_batch", size,
              f"a divisor of transfer.batch_size ({self.batch_size})")
        check(not (self.sequence and self.random_start), "transfer.random_start", self.random_start,
              "false with sequence")


@dataclass(frozen=True, kw_only=True)
class Linear(_Frozen, _Seen, _Trained):
    """A linear classifier on frozen features; its rate falls in a line."""

    name: ClassVar[str] = "linear"


@dataclass(frozen=True, kw_only=True)
class Neighbours(_Frozen, _Seen):
    """The vote of the nearest training clips, weighted by exp(cosine / 0.07)."""

    name: ClassVar[str] = "knn"
    neighbours: Count = 20
    """How many vote."""


Trained = Finetune | Linear
Protocol = Finetune | Linear | Neighbours
PROTOCOLS: dict[str, type[Protocol]] = {kind.name: kind for kind in (Finetune, Linear, Neighbours)}

# Finetuning. Both CNNs and the Transformers for two modalities, a CNN alone for one (method: "as released").
_ONE_CNN = Finetune(epochs=20, batch_size=32, head_rate=0.03, backbone_rate=1e-4, adam_eps=1e-6)
_SEQUENCE = Finetune(epochs=20, batch_size=5, head_rate=1e-3, backbone_rate=1e-4, sequence=True)
# Open in the release: 30 s are 15 clips of 2 s, so that all of a Charades video is seen.
_MULTI_LABEL = dataclasses.replace(_SEQUENCE, loss="binary", train_views=15, test_views=15)
_FINETUNE = {"ucf101": _ONE_CNN, "esc50": _ONE_CNN, "esc10": _ONE_CNN, "kinetics-sounds": _SEQUENCE,
             "charades": _MULTI_LABEL, "audioset": dataclasses.replace(_SEQUENCE, loss="binary"),
             "demo": _SEQUENCE, "folder": _SEQUENCE}
# Published for ESC-50; elsewhere ours: the same with cross-entropy (or a sigmoid a class) on standardised features.
_ESC_LINEAR = Linear(epochs=300, batch_size=128, head_rate=0.003, dropout=0.1, loss="hinge", test_crops=1)


def protocol_for(task: str, name: str, recipe: str, overrides: Iterable[str] = ()) -> Protocol:
    """The settings of a task's protocol.

    Args:
        task: a key of `TASKS`.
        name: finetune, linear or knn.
        recipe: published, or small: for small networks on CPUs, minutes instead of days.
        overrides: `transfer.field=value`.

    Raises:
        AvtrainError: a field that this protocol does not have, or a value of the wrong type or out of range.
    """
    finetune = _FINETUNE[task]
    chosen: Protocol
    if name == "finetune":
        chosen = finetune if recipe == "published" else _small_finetune(finetune)
    elif name == "linear":
        chosen = _linear(task, recipe)
    else:
        linear = _linear(task, recipe)
        chosen = Neighbours(test_views=linear.test_views, test_crops=linear.test_crops, standardize=linear.standardize)
    values = {field: value for _, field, value in map(parse_override, overrides)}
    return dataclasses.replace(chosen, **section_values("transfer", type(chosen), values, f"of the protocol {name}"))


def _linear(task: str, recipe: str) -> Linear:
    if TASKS[task].dataset.startswith("esc") and recipe == "published":
        return _ESC_LINEAR
    finetune = _FINETUNE[task]
    return dataclasses.replace(_ESC_LINEAR, loss="binary" if finetune.loss == "binary" else "cross_entropy",
                               standardize=True, epochs=100, test_crops=3 if recipe == "published" else 1,
                               test_views=max(10, finetune.test_views))


def _small_finetune(published: Finetune) -> Finetune:
    """All weights from anywhere at one rate; stronger masks; a sequence, or one random clip of a video an epoch, with
    sound as of another recording."""
    return dataclasses.replace(
        published, epochs=30 if published.sequence else 60, batch_size=16 if published.sequence else 32,
        head_rate=3e-3, backbone_rate=3e-3, warmup=0.1, weight_decay=1e-4, adam_eps=1e-8, dropout=0.2,
        label_smoothing=0.1 if published.loss == "cross_entropy" else 0.0, random_start=not published.sequence,
        test_crops=1, test_whole=False, frequency_mask=0.2, time_mask=0.2,
        equalizer=0.0 if published.sequence else 0.5, frequency_shift=0 if published.sequence else 2)
