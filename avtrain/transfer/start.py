"""What is transferred: a checkpoint, ours or the authors', or a random start."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from avtrain.checkpoints.authors import load_released_parts
from avtrain.checkpoints.ours import load_checkpoint, parts_of
from avtrain.config import Config, DataConfig, parse_override, read_config
from avtrain.errors import AvtrainError
from avtrain.fields import section_values
from avtrain.models.avbert import AVBert
from avtrain.run_folder import newest_weights
from avtrain.runtime import seed_everything


@dataclass(frozen=True)
class Start:
    """What is transferred.

    Attributes:
        model: the network with its weights.
        data: what it takes.
        name: the checkpoint's path, or how it was drawn.
        sha256: of the checkpoint's file; empty for a random start.
        parts: which of visual, audio and transformers have been trained.
    """

    model: AVBert
    data: DataConfig
    name: str
    sha256: str
    parts: frozenset[str]

    def check_parts(self, modality: str, transformers: bool) -> None:
        """Raise AvtrainError where an answer of a checkpoint would come from a part that it has not trained."""
        missing = sorted(parts_of(modality, transformers) - self.parts)
        if missing and self.sha256:
            names = {"visual": "a visual CNN", "audio": "an audio CNN", "transformers": "Transformers"}
            raise AvtrainError(f"{self.name}: {' and '.join(names[part] for part in missing)} would be needed, and it "
                               f"has learned only {' and '.join(names[part] for part in sorted(self.parts))}")


def load_source(checkpoint: Path, overrides: Iterable[str] = ()) -> Start:
    """Read a checkpoint of ours (.safetensors) or of the authors' release.

    Args:
        checkpoint: the file.
        overrides: `data.field=value`.

    Raises:
        AvtrainError: it is neither, or its weights are not finite.
        OSError: the file can't be read.
    """
    if checkpoint.suffix == ".safetensors":
        model, config, parts = load_checkpoint(checkpoint)
        data = config.data
    else:
        (model, parts), data = load_released_parts(checkpoint), DataConfig()
    if not all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values()):
        raise AvtrainError(f"{checkpoint}: holds weights that are not finite numbers: its training diverged; use an "
                           "earlier checkpoint")
    values = {field: value for _, field, value in map(parse_override, overrides)}
    data = dataclasses.replace(data, **section_values("data", DataConfig, values))
    Config(model=model.config, data=data)  # checks that they go together
    with checkpoint.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return Start(model, data, str(checkpoint), digest.hexdigest(), parts)


def newest_checkpoint(root: Path) -> Path:
    """The file of the last checkpoint of the newest pretraining run below a folder.

    Raises:
        AvtrainError: there is none.
    """
    found = newest_weights(root)
    if found is None:
        raise AvtrainError(f"no run of `avtrain pretrain` with a checkpoint under {root}/: say what to transfer with "
                           "--checkpoint FILE, or --init random for a network that has learned nothing")
    return found


def random_source(preset: str, overrides: Iterable[str], seed: int) -> Start:
    """A network at its random start.

    Args:
        preset: tiny, small, sound, paper, or a .toml file.
        overrides: `model.field=value` or `data.field=value`.
        seed: of its weights.
    """
    config = read_config(preset, overrides)
    seed_everything(seed)
    return Start(AVBert(config.model), config.data, f"random start of preset {preset}", "", frozenset())
