"""Which segments a clip has, from its manifest's row alone: so what a batch will hold is known before it is decoded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from avtrain.config import ClipConfig
from avtrain.data.manifest import ClipRow


def segments_in(frames: int, length: int) -> int:
    """Segments of that length in so many frames. One counts from half its length on; what is shorter still gives one
    where it is all there is."""
    return max(int(frames > 0), (2 * frames + length) // (2 * length))


def counted(row: ClipRow, config: ClipConfig, length: int) -> tuple[int, int]:
    """(seen, heard): segments that the stored clip has of what is wanted of it.

    Args:
        row: of the manifest.
        config: what a segment is, and which modalities are wanted.
        length: of a segment, in stored frames.
    """
    return (segments_in(row.frames, length) if config.modality != "audio" else 0,
            segments_in(row.mel_frames, config.mel_frames) if config.modality != "visual" else 0)


def presence(row: ClipRow, config: ClipConfig, length: int) -> NDArray[np.bool_]:
    """(2, segments): which segments of a whole clip have picture, and which sound, as `ClipDataset` gives it.

    Of a clip with more segments than are taken, those are taken that have both, as far as there are any: where they
    begin changes nothing here.

    Args:
        row, config, length: as in `counted`.
    """
    there: NDArray[np.bool_] = np.arange(config.segments) < np.array(counted(row, config, length))[:, None]
    return there


def starts_possible(row: ClipRow, config: ClipConfig, length: int) -> int:
    """At how many of its segments the part of a clip that is taken may begin; see `presence`.

    Args:
        row, config, length: as in `counted`.
    """
    return max(1, min((count for count in counted(row, config, length) if count), default=0) - config.segments + 1)
