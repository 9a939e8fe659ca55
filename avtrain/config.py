"""Settings: typed, checked on construction, read from `presets/*.toml` and `--set section.field=value`."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avtrain.errors import AvtrainError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESET_FOLDER = Path(__file__).parent / "presets"
VISUAL_NETWORKS = ("slow50", "slowfast50")
FUSIONS = ("early", "mid", "late")
SAMPLINGS = ("similar", "dissimilar", "random")
MODALITIES = ("visual", "audio", "both")


@dataclass(frozen=True)
class ModelConfig:
    """The network. The defaults are the published one (mid fusion, all shared, low rank): 43,778,080 parameters."""

    visual: str = "slow50"
    """Visual CNN: slow50 (as released) or slowfast50 (as in the paper's text)."""
    visual_width: int = 64
    """Channels of the visual CNN's stem."""
    visual_blocks: tuple[int, ...] = (3, 4, 6, 3)
    """Bottleneck blocks of each of the visual CNN's stages."""
    audio_width: int = 32
    """Channels of the audio CNN's stem."""
    audio_blocks: tuple[int, ...] = (3, 4, 6, 3)
    """Bottleneck blocks of each of the audio CNN's stages."""
    audio_stem_stride: int = 1
    """Stride of the audio CNN's stem, in frequency and in time."""
    log_mel_mean: float = 0.0
    """Subtracted from the log-mel before the audio CNN; 0 as published. Values lie around -3."""
    log_mel_deviation: float = 1.0
    """Divides the log-mel after that; 1 as published. Values deviate by 3 or 4."""
    dimension: int = 768
    """D, the length of local embeddings and tokens."""
    layers: int = 6
    """L, layers of each Transformer."""
    heads: int = 12
    """Attention heads; they divide the dimension."""
    feedforward: int = 3072
    """Inner features of the feed-forward part."""
    dropout: float = 0.1
    """Probability, in the Transformers."""
    max_segments: int = 21
    """Longest clip, in segments: that many learned positions, and one for BOS."""
    fusion: str = "mid"
    """early: only the multimodal Transformer; late: only the single-modality ones; mid: both."""
    share_layers: bool = True
    """The layers of a Transformer share one set of weights."""
    share_transformers: bool = True
    """The Transformers share their weights, entirely or (with a rank) their large factor U."""
    rank: int | None = 128
    """O, inner dimension of the factored linear layers; none: not factored."""
    segments_at_once: int = 0
    """Above 0: activation checkpointing. The CNNs run on this many segments at a time and are run again in the
    backward pass; BatchNorm's batch is then these segments. 0: all at once, nothing recomputed."""

    def __post_init__(self) -> None:
        _check_choice("model.visual", self.visual, VISUAL_NETWORKS)
        _check_choice("model.fusion", self.fusion, FUSIONS)
        for name in ("visual_width", "audio_width", "audio_stem_stride", "dimension", "layers", "heads", "feedforward",
                     "max_segments"):
            _check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        _check(self.log_mel_deviation > 0, "model.log_mel_deviation", self.log_mel_deviation, "above 0")
        for name in ("visual_blocks", "audio_blocks"):
            blocks = getattr(self, name)
            _check(bool(blocks) and min(blocks) >= 1, f"model.{name}", blocks, "one or more counts, each at least 1")
        _check(self.visual != "slowfast50" or self.visual_width % 8 == 0, "model.visual_width", self.visual_width,
               "a multiple of 8 for slowfast50")
        _check(self.dimension % self.heads == 0, "model.heads", self.heads,
               f"a divisor of model.dimension ({self.dimension})")
        _check(0 <= self.dropout < 1, "model.dropout", self.dropout, "at least 0 and under 1")
        _check(self.rank is None or self.rank >= 2, "model.rank", self.rank, "at least 2, or none")
        _check(self.segments_at_once >= 0, "model.segments_at_once", self.segments_at_once, "at least 0")


@dataclass(frozen=True)
class DataConfig:
    """What one training clip looks like."""

    modality: str = "both"
    """visual, audio or both: what else the shards hold is left out."""
    segments: int = 15
    """Segments of a clip."""
    segment_frames: int = 32
    """Frames of a visual segment."""
    crop: int = 112
    """Height and width of a frame, in pixels."""
    mels: int = 80
    """Mel bands of an audio segment."""
    mel_frames: int = 128
    """Spectrogram frames of an audio segment."""
    scale: tuple[int, ...] = (128, 160)
    """Pixels that the short side is scaled to before the crop: drawn between these two for each clip in training; the
    first in evaluation."""
    frequency_mask: float = 0.05
    """Largest share of the mel bands that is masked in training."""
    time_mask: float = 0.05
    """Largest share of a segment's time that is masked in training."""
    equalizer: float = 0.0
    """In training, every audio segment goes through a random filter: deviation of its gains, in nats of log-mel."""
    noise: tuple[float, ...] = ()
    """In training, every audio segment gets noise of a mean log-mel drawn between these two; empty: none."""
    frequency_shift: int = 0
    """In training, every audio segment is shifted by up to so many mel bands."""
    shards_at_once: int = 8
    """Clips are shuffled among this many shards at a time."""
    workers: int = 2
    """Processes that make batches; 0: none beside the training's own."""

    def __post_init__(self) -> None:
        _check_choice("data.modality", self.modality, MODALITIES)
        for name in ("segments", "segment_frames", "crop", "mels", "mel_frames", "shards_at_once"):
            _check(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "at least 1")
        _check(len(self.scale) == 2 and self.crop <= self.scale[0] <= self.scale[1], "data.scale", self.scale,
               f"[shortest, longest], both at least data.crop ({self.crop})")
        for name in ("frequency_mask", "time_mask"):
            _check(0 <= getattr(self, name) <= 1, f"data.{name}", getattr(self, name), "between 0 and 1")
        _check(len(self.noise) in (0, 2) and list(self.noise) == sorted(self.noise), "data.noise", self.noise,
               "[quietest, loudest], or [] for none,")
        for name in ("equalizer", "frequency_shift", "workers"):
            _check(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "at least 0")


@dataclass(frozen=True)
class ObjectivesConfig:
    """What pretraining minimises. A weight of 0 switches a part off."""

    mask_rate: float = 0.15
    """Share of the segments that are hidden and predicted (open in the paper; BERT's)."""
    negatives: int = 64
    """Wrong candidates beside each true one."""
    sampling: str = "similar"
    """How negatives are drawn: similar, dissimilar (both by the CNN embeddings' distance) or random."""
    keep_percent: float = 95.0
    """Middle part of the distances that negatives may come from."""
    mep_visual: float = 1.0
    """Weight of masked prediction in the visual Transformer."""
    mep_audio: float = 1.0
    """Weight of masked prediction in the audio Transformer."""
    mep_multimodal: float = 1.0
    """Weight of masked prediction in the multimodal Transformer."""
    pair: float = 1.0
    """Weight of correct pair prediction: alpha in the paper."""
    draws: int = 1
    """Times that masks, wrong pairs and negatives are drawn for a batch; the CNNs run once."""

    def __post_init__(self) -> None:
        _check_choice("objectives.sampling", self.sampling, SAMPLINGS)
        _check(0 < self.mask_rate < 1, "objectives.mask_rate", self.mask_rate, "between 0 and 1")
        for name in ("negatives", "draws"):
            _check(getattr(self, name) >= 1, f"objectives.{name}", getattr(self, name), "at least 1")
        _check(0 < self.keep_percent <= 100, "objectives.keep_percent", self.keep_percent, "above 0, at most 100")
        for name in ("mep_visual", "mep_audio", "mep_multimodal", "pair"):
            _check(getattr(self, name) >= 0, f"objectives.{name}", getattr(self, name), "at least 0")


@dataclass(frozen=True)
class TrainingConfig:
    """Optimiser, schedule, and when to look at the run."""

    batch_size: int = 256
    """Clips of an optimiser step, over all ranks and accumulated parts."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other; negatives come from within a part."""
    steps: int = 220_000
    """Optimiser steps of the whole run: the schedule's length."""
    learning_rate: float = 1e-4
    """At the end of the warm-up."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises from 0; then it falls to 0 along a cosine."""
    weight_decay: float = 1e-4
    """AdamW's, on all but norms and biases."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    log_every: int = 10
    """Steps between lines of metrics; a line has the figures of its own step."""
    evaluate_every: int = 5000
    """Steps between evaluations on held-out clips."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 3
    """Checkpoints that are kept, the last ones."""
    seed: int = 0
    """Decides order, views, masks, negatives, dropout and start weights."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "steps", "log_every", "evaluate_every", "save_every", "keep"):
            _check(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "at least 1")
        for name in ("learning_rate", "weight_decay", "clip_norm", "seed"):
            _check(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "at least 0")
        _check(self.seed < 2**32, "training.seed", self.seed, "under 2**32")
        _check(0 <= self.warmup < 1, "training.warmup", self.warmup, "at least 0 and under 1")
        _check(self.batch_size % self.accumulate == 0, "training.batch_size", self.batch_size,
               f"a multiple of training.accumulate ({self.accumulate})")


@dataclass(frozen=True)
class Config:
    """All settings of a run, one section a part."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        _check(self.data.segments <= self.model.max_segments, "data.segments", self.data.segments,
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
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AvtrainError(f"{path}: not valid TOML: {error}") from error
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
        return section, option, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return section, option, text.strip()


def check_overrides(overrides: Iterable[str], sections: Sequence[str], idle: Iterable[str]) -> None:
    """Refuse what can't be set here, or would do nothing.

    Args:
        overrides: `section.field=value`.
        sections: those that can be set.
        idle: fields of data that play no part.

    Raises:
        AvtrainError: names the option.
    """
    for override in overrides:
        section, option, _ = parse_override(override)
        if section not in sections:
            raise AvtrainError(f"--set {override}: only {' and '.join(f'{name}.*' for name in sections)} can be set "
                               "here")
        if section == "data" and option in idle:
            raise AvtrainError(f"--set {override}: data.{option} would do nothing here; leave it out")


def config_from(values: Mapping[str, Any], where: str) -> Config:
    """Settings from nested dictionaries, as TOML or JSON has them; what they leave out keeps its default.

    Args:
        values: section -> field -> value.
        where: named in errors.

    Raises:
        AvtrainError: an unknown name, a value of the wrong type or out of range.
    """
    try:
        sections = typing.get_type_hints(Config)
        for name, content in values.items():
            _check_known(name, sections, "")
            if not isinstance(content, Mapping):
                raise AvtrainError(f"{name}: a section of fields is wanted, not {content!r}")
        return Config(**{name: kind(**section_values(name, kind, values.get(name, {})))
                         for name, kind in sections.items()})
    except AvtrainError as error:
        raise AvtrainError(f"{where}: {error}") from None


def config_to(config: Config) -> dict[str, Any]:
    """The inverse of `config_from`, in types that JSON has."""
    return dataclasses.asdict(config)


def section_values(section: str, kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a section, in the types of the fields of its dataclass `kind`.

    Raises:
        AvtrainError: an unknown name or a value of the wrong type.
    """
    types_of = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        _check_known(name, types_of, f"{section}.")
        arguments[name] = _typed(f"{section}.{name}", types_of[name], value)
    return arguments


def _typed(name: str, kind: Any, value: Any) -> Any:
    """`value` as the type a field has; TOML writes none as "none", JSON as null."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if types.NoneType in options and value in (None, "none"):
        return None
    kind = options[0]
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        if isinstance(value, list | tuple):
            return tuple(_typed(name, inner, item) for item in value)
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif type(value) is kind:
        return value
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise AvtrainError(f"{name} = {value!r}: {wanted.get(kind, 'a list, like [3, 4, 6, 3],')} is wanted")


def _check_known(name: str, known: Iterable[str], prefix: str) -> None:
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise AvtrainError(f"{prefix}{name}: no such setting; did you mean {prefix}{near}?")


def _check(right: bool, name: str, value: object, wanted: str) -> None:
    if not right:
        raise AvtrainError(f"{name} = {value!r}: {wanted} is wanted")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _check(value in choices, name, value, "one of " + ", ".join(choices))
