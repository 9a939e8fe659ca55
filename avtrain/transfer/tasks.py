"""What is transferred to: one table of tasks (shards, splits, modality, published numbers), one of protocols."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from avtrain.config import parse_override, section_values
from avtrain.errors import AvtrainError

PROTOCOLS = ("finetune", "linear", "knn")
LOSSES = ("cross_entropy", "hinge", "binary")
HINGE_MARGIN = 0.1


def _check(right: bool, name: str, value: object, wanted: str) -> None:
    if not right:
        raise AvtrainError(f"transfer.{name} = {value!r}: {wanted} is wanted")


@dataclass(frozen=True)
class Protocol:
    """How a task is learned and tested. Schedules: finetune falls along a cosine, linear in a line; both end at 0.

    The optimiser is Adam; weight decay is its L2 term, and 0 on norms.
    """

    epochs: int
    """Times that every view of the training clips is seen."""
    batch_size: int
    """Rows of an optimiser step: videos with `sequence`, else views of them."""
    head_rate: float
    """Learning rate of the heads at the start."""
    backbone_rate: float = 0.0
    """Learning rate of the networks below the heads (finetune)."""
    warmup: float = 0.0
    """Share of the steps in which the rates rise (finetune)."""
    weight_decay: float = 5e-6
    """L2 term of Adam, on all but norms."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    dropout: float = 0.5
    """Before the heads' linear layers."""
    loss: str = "cross_entropy"
    """cross_entropy, hinge (multi-class, margin 0.1) or binary (a sigmoid a class)."""
    label_smoothing: float = 0.0
    """Of cross_entropy."""
    sequence: bool = False
    """The clips of a video go through the Transformers together, with the second head on their outputs."""
    train_views: int = 10
    """Evenly spaced clips of a video in training."""
    random_start: bool = False
    """In training, one clip of a video an epoch instead, starting anywhere."""
    test_views: int = 10
    """Evenly spaced clips of a video in the test."""
    test_crops: int = 3
    """Crops of each: 1, the centre; 3, left/centre/right or top/centre/bottom. Pictures only."""
    test_whole: bool = True
    """The test's squares are the whole short side, data.scale[0] pixels, as published; false: its centre, data.crop
    pixels as in training. A small network on small pictures may not know a square that is a seventh larger."""
    frequency_mask: float = 0.05
    """Largest share of the mel bands that is masked in training (finetune)."""
    time_mask: float = 0.05
    """Largest share of a clip's time that is masked in training (finetune)."""
    equalizer: float = 0.0
    """In training, every clip's sound goes through a random filter: deviation of its gains, in nats (finetune)."""
    frequency_shift: int = 0
    """In training, sound is shifted by up to so many mel bands (finetune)."""
    standardize: bool = False
    """Features are scaled to zero mean and unit deviation over the training clips (linear, knn)."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, to save memory (finetune)."""
    neighbours: int = 20
    """Nearest training clips that vote (knn), weighted by exp(cosine / 0.07)."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "train_views", "test_views", "accumulate", "neighbours"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("head_rate", "backbone_rate", "weight_decay", "adam_eps", "equalizer", "frequency_shift"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("dropout", "label_smoothing", "warmup"):
            _check(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and under 1")
        for name in ("frequency_mask", "time_mask"):
            _check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        _check(0 < self.head_rate <= 100, "head_rate", self.head_rate, "above 0, at most 100")
        for name in ("train_views", "test_views"):
            _check(getattr(self, name) <= 1000, name, getattr(self, name), "at most 1000")
        _check(self.loss in LOSSES, "loss", self.loss, "one of " + ", ".join(LOSSES))
        _check(self.test_crops in (1, 3), "test_crops", self.test_crops, "1 or 3")
        _check(self.test_whole or self.test_crops == 1, "test_crops", self.test_crops, "1 without test_whole")
        _check(self.batch_size % self.accumulate == 0, "batch_size", self.batch_size,
               f"a multiple of transfer.accumulate ({self.accumulate})")
        _check(not (self.sequence and self.random_start), "random_start", self.random_start, "false with sequence")


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

# Finetuning. Both CNNs and the Transformers for two modalities, a CNN alone for one (method: "as released").
_ONE_CNN = Protocol(epochs=20, batch_size=32, head_rate=0.03, backbone_rate=1e-4, adam_eps=1e-6)
_SEQUENCE = Protocol(epochs=20, batch_size=5, head_rate=1e-3, backbone_rate=1e-4, sequence=True)
# Open in the release: 30 s are 15 clips of 2 s, so that all of a Charades video is seen.
_MULTI_LABEL = dataclasses.replace(_SEQUENCE, loss="binary", train_views=15, test_views=15)
_FINETUNE = {"ucf101": _ONE_CNN, "esc50": _ONE_CNN, "esc10": _ONE_CNN, "kinetics-sounds": _SEQUENCE,
             "charades": _MULTI_LABEL, "audioset": dataclasses.replace(_SEQUENCE, loss="binary"),
             "demo": _SEQUENCE, "folder": _SEQUENCE}
# Published for ESC-50; elsewhere ours: the same with cross-entropy (or a sigmoid a class) on standardised features.
_ESC_LINEAR = Protocol(epochs=300, batch_size=128, head_rate=0.003, dropout=0.1, loss="hinge", test_crops=1)

# Fields of a protocol that play no part in it.
_OF_NETWORK = {"backbone_rate", "warmup", "sequence", "random_start", "frequency_mask", "time_mask", "equalizer",
               "frequency_shift", "accumulate"}
_IDLE = {"finetune": {"standardize", "neighbours"}, "linear": {*_OF_NETWORK, "neighbours"},
         "knn": {field.name for field in dataclasses.fields(Protocol)} - {
             "train_views", "test_views", "test_crops", "test_whole", "standardize", "neighbours"}}


def protocol_for(task: str, name: str, recipe: str, overrides: Iterable[str] = ()) -> Protocol:
    """The settings of a task's protocol.

    Args:
        task: a key of `TASKS`.
        name: finetune, linear or knn.
        recipe: published, or small: for small networks on CPUs, minutes instead of days.
        overrides: `transfer.field=value`.

    Raises:
        AvtrainError: an unknown field, one that plays no part in this protocol, or a value of the wrong type or out of
            range.
    """
    finetune = _FINETUNE[task]
    if name == "finetune":
        chosen = finetune if recipe == "published" else _small_finetune(finetune)
    elif TASKS[task].dataset.startswith("esc") and recipe == "published":
        chosen = _ESC_LINEAR
    else:
        loss = "binary" if finetune.loss == "binary" else "cross_entropy"
        chosen = dataclasses.replace(_ESC_LINEAR, loss=loss, standardize=True, epochs=100, train_views=10,
                                     test_crops=3 if recipe == "published" else 1,
                                     test_views=max(10, finetune.test_views))
    values = {}
    for override in overrides:
        _, field, value = parse_override(override)
        if field in _IDLE[name]:
            raise AvtrainError(f"--set {override}: transfer.{field} would do nothing in the protocol {name} of {task}; "
                               "leave it out")
        values[field] = value
    return dataclasses.replace(chosen, **section_values("transfer", Protocol, values))


def _small_finetune(published: Protocol) -> Protocol:
    """All weights from anywhere at one rate; stronger masks; a sequence, or one random clip of a video an epoch, with
    sound as of another recording."""
    return dataclasses.replace(
        published, epochs=30 if published.sequence else 60, batch_size=16 if published.sequence else 32,
        head_rate=3e-3, backbone_rate=3e-3, warmup=0.1, weight_decay=1e-4, adam_eps=1e-8, dropout=0.2,
        label_smoothing=0.1 if published.loss == "cross_entropy" else 0.0, random_start=not published.sequence,
        test_crops=1, test_whole=False, frequency_mask=0.2, time_mask=0.2,
        equalizer=0.0 if published.sequence else 0.5, frequency_shift=0 if published.sequence else 2)
