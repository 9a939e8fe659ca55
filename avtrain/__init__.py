"""The shared-parameter audio-visual Transformer: pretraining from shards, and transfer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avtrain.checkpoints.authors import load_released
    from avtrain.data.stream import clips

__version__ = "0.1.0"
__all__ = ["clips", "load_released"]


def __getattr__(name: str) -> Any:
    # torch takes a second to import; `import avtrain` and `avtrain --help` do without it.
    if name == "load_released":
        from avtrain.checkpoints.authors import load_released

        return load_released
    if name == "clips":
        from avtrain.data.stream import clips

        return clips
    raise AttributeError(f"module 'avtrain' has no attribute {name!r}")
