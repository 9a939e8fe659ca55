"""Settings: typed, checked on construction, read from `presets/*.toml` and `--set section.field=value`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from avtrain.errors import AvtrainError, in_a_line
from avtrain.fields import (
    Amount,
    Count,
    Positive,
    Probability,
    Range,
    Share,
    Whole,
    check,
    check_fields,
    check_known,
    kinds_of,
    section_values,
)
from avtrain.retired import current_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESET_FOLDER = Path(__file__).parent / "presets"
Modality = Literal["visual", "audio", "both"]
# Far above what anybody trains: a stranger's settings decide how much is made before a tensor of theirs is read.
Size = Annotated[int, Range(at_least=1, at_most=2**16)]
Depth = Annotated[int, Range(at_least=1, at_most=256)]
_MOST_STAGES = 8
HOW_MADE = ("workers", "timeout_s")  # fields of `data` that say how batches are made, and change none
HOW_DIVIDED = ("micro_batch",)  # of `training`, how processes share a batch: those of a run may change in number
WHEN_LOOKED_AT = ("log_every", "evaluate_every", "save_every", "save_minutes", "keep")  # of `training`, likewise


@dataclass(frozen=True)
class ModelConfig:
    """The network. The defaults are the published one (mid fusion, all shared, low rank): 43,778,080 parameters."""

    visual: Literal["slow50", "slowfast50"] = "slow50"
    """Visual CNN: slow50 (as released) or slowfast50 (as in the paper's text)."""
    visual_width: Size = 64
    """Channels of the visual CNN's stem."""
    visual_blocks: tuple[Depth, ...] = (3, 4, 6, 3)
    """Bottleneck blocks of each of the visual CNN's stages."""
    audio_width: Size = 32
    """Channels of the audio CNN's stem."""
    audio_blocks: tuple[Depth, ...] = (3, 4, 6, 3)
    """Bottleneck blocks of each of the audio CNN's stages."""
    audio_stem_stride: Size = 1
    """Stride of the audio CNN's stem, in frequency and in time."""
    log_mel_mean: float = 0.0
    """Subtracted from the log-mel before the audio CNN; 0 as published. Values lie around -3."""
    log_mel_std: Positive = 1.0
    """Divides the log-mel after that; 1 as published. Values deviate by 3 or 4."""
    dimension: Size = 768
    """D, the length of local embeddings and tokens."""
    layers: Depth = 6
    """L, layers of each Transformer."""
    heads: Size = 12
    """Attention heads; they divide the dimension."""
    feedforward: Size = 3072
    """Inner features of the feed-forward part."""
    dropout: Probability = 0.1
    """Probability, in the Transformers."""
    max_segments: Size = 21
    """Longest clip, in segments: that many learned positions, and one for BOS."""
    fusion: Literal["early", "mid", "late"] = "mid"
    """early: only the multimodal Transformer; late: only the single-modality ones; mid: both."""
    share_layers: bool = True
    """The layers of a Transformer share one set of weights."""
    share_transformers: bool = True
    """The Transformers share their weights, entirely or (with a rank) their large factor U."""
    rank: Annotated[int, Range(at_least=2, at_most=2**16)] | None = 128
    """O, inner dimension of the factored linear layers; none: not factored."""
    stages_recomputed: Whole = 0
    """Activation checkpointing: so many first stages of both CNNs keep no maps for the backward pass, but run again in
    it. Less memory and more time, and nothing else changes. 0: none; more than a CNN has: all."""

    def __post_init__(self) -> None:
        check_fields(self, "model")
        for name in ("visual_blocks", "audio_blocks"):
            check(0 < len(getattr(self, name)) <= _MOST_STAGES, f"model.{name}", getattr(self, name),
                  f"one to {_MOST_STAGES} counts")
        check(self.visual != "slowfast50" or self.visual_width % 8 == 0, "model.visual_width", self.visual_width,
              "a multiple of 8 for slowfast50")
        check(self.dimension % self.heads == 0, "model.heads", self.heads,
              f"a divisor of model.dimension ({self.dimension})")


@dataclass(frozen=True)
class ViewConfig:
    """What a network takes of a clip. It is all that there is of `data` where a protocol says which views it sees."""

    segment_frames: Count = 32
    """Frames of a visual segment."""
    crop: Count = 112
    """Height and width of a frame, in pixels."""
    mels: Count = 80
    """Mel bands of an audio segment."""
    mel_frames: Count = 128
    """Spectrogram frames of an audio segment."""
    scale: tuple[int, ...] = (128, 160)
    """Pixels that the short side is scaled to before the crop: drawn between these two for each clip in training; the
    first in evaluation."""
    workers: Whole = 2
    """Processes that make batches; 0: none beside the training's own."""
    timeout_s: Positive = 900.0
    """A worker whose batch is waited for that long hangs: it is replaced once, then the run ends."""

    def __post_init__(self) -> None:
        check_fields(self, "data")
        check(len(self.scale) == 2 and self.crop <= self.scale[0] <= self.scale[1], "data.scale", self.scale,
              f"[shortest, longest], both at least data.crop ({self.crop})")


@dataclass(frozen=True)
class ClipConfig(ViewConfig):
    """And how much it takes of it. It is all that there is of `data` where clips are embedded."""

    modality: Modality = "both"
    """visual, audio or both: what else the shards hold is left out."""
    segments: Count = 15
    """Segments of a clip."""


@dataclass(frozen=True)
class DataConfig(ClipConfig):
    """And what happens to it in pretraining."""

    frequency_mask: Share = 0.05
    """Largest share of the mel bands that is masked in training."""
    time_mask: Share = 0.05
    """Largest share of a segment's time that is masked in training."""
    equalizer: Amount = 0.0
    """In training, every audio segment goes through a random filter: std of its gains, in nats of log-mel."""
    noise: tuple[float, ...] = ()
    """In training, every audio segment gets noise of a mean log-mel drawn between these two; empty: none."""
    frequency_shift: Whole = 0
    """In training, every audio segment is shifted by up to so many mel bands."""
    shards_at_once: Count = 8
    """Clips are shuffled among this many shards at a time."""
    order: Literal["exact", "stream"] = "exact"
    """exact: shuffled well, and the same for any number of processes and workers. stream: each worker reads shards of
    its own from start to end, for stores too far away for anything else."""
    stream_buffer: Count = 256
    """Of a stream: clips that each worker keeps in memory and shuffles among."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.noise) in (0, 2) and list(self.noise) == sorted(self.noise), "data.noise", self.noise,
              "[quietest, loudest], or [] for none,")


@dataclass(frozen=True)
class ObjectivesConfig:
    """What pretraining minimises. A weight of 0 switches a part off."""

    mask_rate: Annotated[float, Range(above=0, under=1)] = 0.15
    """Share of the segments that are hidden and predicted (open in the paper; BERT's)."""
    negatives: Count = 64
    """Wrong candidates beside each true one."""
    sampling: Literal["similar", "dissimilar", "random"] = "similar"
    """How negatives are drawn: similar, dissimilar (both by the CNN embeddings' distance) or random."""
    keep_percent: Annotated[float, Range(above=0, at_most=100)] = 95.0
    """Middle part of the distances that negatives may come from."""
    mep_visual: Amount = 1.0
    """Weight of masked prediction in the visual Transformer."""
    mep_audio: Amount = 1.0
    """Weight of masked prediction in the audio Transformer."""
    mep_multimodal: Amount = 1.0
    """Weight of masked prediction in the multimodal Transformer."""
    pair: Amount = 1.0
    """Weight of correct pair prediction: alpha in the paper."""
    negatives_from: Literal["global", "local"] = "global"
    """Of several processes, whose clips negatives and wrong pairs' sounds come from: all (global) or each its own
    (local)."""
    draws: Count = 1
    """Times that masks, wrong pairs and negatives are drawn for a batch; the CNNs run once."""

    def __post_init__(self) -> None:
        check_fields(self, "objectives")


@dataclass(frozen=True)
class TrainingConfig:
    """Optimiser, schedule, and when to look at the run."""

    batch_size: Count = 256
    """Clips of an optimiser step, of all processes and parts."""
    micro_batch: Count | None = None
    """Clips that a process computes at once: it takes its share of a batch in so large parts, one after the other.
    BatchNorm, wrong pairs and negatives see a part of all processes. none: the share is one part."""
    sync_batchnorm: bool = True
    """Of several processes, BatchNorm measures all clips of a part; false: each process its own."""
    steps: Count = 220_000
    """Optimiser steps of the whole run: the schedule's length."""
    learning_rate: Amount = 1e-4
    """At the end of the warm-up."""
    warmup: Probability = 0.05
    """Share of the steps in which the rate rises from 0; then it falls to 0 along a cosine."""
    weight_decay: Amount = 1e-4
    """AdamW's, on all but norms and biases."""
    clip_norm: Amount = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    cuda_graphs: bool = False
    """On a GPU: launch CNNs and Transformers as CUDA graphs wherever all clips of a part have all their segments. The
    graphs keep their memory, so other parts need room beside them."""
    log_every: Count = 10
    """Steps between lines of metrics; a line has the figures of its own step."""
    evaluate_every: Count = 5000
    """Steps between evaluations on held-out clips, each after a checkpoint."""
    held_out_clips: Count = 2048
    """Held-out clips of an evaluation, at most; the same ones every time, evenly taken from all held-out shards."""
    save_every: Count = 1000
    """Steps between checkpoints."""
    save_minutes: Amount = 30.0
    """A checkpoint at least that often, in minutes; 0: only by steps."""
    keep: Count = 3
    """Checkpoints that are kept, the last ones."""
    seed: Annotated[int, Range(at_least=0, under=2**32)] = 0
    """Decides order, views, masks, negatives, dropout and start weights."""

    def __post_init__(self) -> None:
        check_fields(self, "training")
        size = self.micro_batch or self.batch_size
        check(self.batch_size % size == 0, "training.micro_batch", size,
              f"a divisor of training.batch_size ({self.batch_size})")


@dataclass(frozen=True)
class Config:
    """All settings of a run, one section a part."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        check(self.data.segments <= self.model.max_segments, "data.segments", self.data.segments,
              f"at most model.max_segments ({self.model.max_segments})")


def read_config(preset: str = "paper", overrides: Iterable[str] = ()) -> Config:
    """Settings from a preset and `section.field=value` overrides.

    Args:
        preset: a name in avtrain/presets, or the path of a TOML file.
        overrides: for example "model.rank=64"; values as in TOML, quotes optional.

    Raises:
        AvtrainError: names the file or option, what is wrong, and the nearest right name.
    """
    path = Path(preset) if preset.endswith(".toml") else PRESET_FOLDER / f"{preset}.toml"
    if not path.is_file():
        known = sorted(file.stem for file in PRESET_FOLDER.glob("*.toml"))
        raise AvtrainError(f"preset {preset}: not found; known are {', '.join(known)}, or give a .toml file")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also of bytes that are no text, and numbers of many digits
        raise AvtrainError(f"{path}: not valid TOML: {in_a_line(error)}") from error
    try:
        values = {section: current_names(section, inside, written=False) if isinstance(inside, dict) else inside
                  for section, inside in values.items()}
    except AvtrainError as error:
        raise AvtrainError(f"{path}: {error}") from None
    for override in overrides:
        section, option, value = parse_override(override)
        inside = values.setdefault(section, {})
        if isinstance(inside, dict):
            inside[option] = value
    return config_from(values, str(path))


def parse_override(override: str) -> tuple[str, str, Any]:
    """(section, field, value) of `section.field=value`; values as in TOML, quotes optional.

    Raises:
        AvtrainError: it is not of that form.
    """
    name, equals, text = override.partition("=")
    section, dot, option = name.strip().partition(".")
    if not equals or not dot:
        raise AvtrainError(f"--set {override}: write section.field=value, for example model.rank=64")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    try:
        [(option, value)] = current_names(section, {option: value}, written=False).items()
    except AvtrainError as error:
        raise AvtrainError(f"--set {override}: {error}") from None
    return section, option, value


def check_overrides(overrides: Iterable[str], sections: Mapping[str, type[Any] | None]) -> None:
    """Refuse what can't be set in a command.

    Args:
        overrides: `section.field=value`.
        sections: name -> dataclass of what can be set there; None: it is checked elsewhere.

    Raises:
        AvtrainError: names the option.
    """
    for override in overrides:
        section, option, _ = parse_override(override)
        if section not in sections:
            raise AvtrainError(f"--set {override}: only {' and '.join(f'{name}.*' for name in sections)} can be set "
                               "here")
        if kind := sections[section]:
            check_known(option, kinds_of(kind), f"{section}.", "here")


def config_from(values: Mapping[str, Any], where: str) -> Config:
    """Settings from nested dictionaries, as this version or an earlier one has written them down; what they leave out
    keeps its default.

    Args:
        values: section -> field -> value.
        where: named in errors.

    Raises:
        AvtrainError: an unknown name, a value of the wrong type or out of range.
    """
    try:
        sections = kinds_of(Config)
        for name, content in values.items():
            check_known(name, sections)
            if not isinstance(content, Mapping):
                raise AvtrainError(f"{name}: a section of fields is wanted, not {content!r}")
        current = {name: current_names(name, values.get(name, {}), written=True) for name in sections}
        return Config(**{name: kind(**section_values(name, kind, current[name])) for name, kind in sections.items()})
    except AvtrainError as error:
        raise AvtrainError(f"{where}: {error}") from None


def config_to(config: Config) -> dict[str, Any]:
    """The inverse of `config_from`, in types that JSON has."""
    return dataclasses.asdict(config)
