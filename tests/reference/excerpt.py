"""The small files beside this one, made from the whole reference: python tests/reference/excerpt.py WHOLE-FOLDER.

`logmel.npz` has every 8th frame of the log-mels whose waveforms anyone can redraw; `avbert_outputs.npz` has some values
of every output, each a fixed step from the next; `avbert_state_dict.csv.gz` is the list of tensors, whole.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
FRAME_STEP, MOST_VALUES = 8, 512


def step_of(size: int) -> int:
    """From one kept value of an output to the next; odd, so that the kept ones stand in many columns."""
    return -(-size // MOST_VALUES) | 1


def main(whole: Path) -> None:
    """Write the three files."""
    with np.load(whole / "logmel.npz") as file:
        drawn = {name: file[name] for name in file if name.startswith("logmel_") and "dog_bark" not in name}
    np.savez_compressed(HERE / "logmel.npz", **{name: array[:, ::FRAME_STEP] for name, array in drawn.items()})
    with np.load(whole / "avbert_outputs.npz") as file:
        outputs = {name: file[name].ravel()[::step_of(file[name].size)] for name in file}
    np.savez_compressed(HERE / "avbert_outputs.npz", **outputs)
    content = gzip.compress((whole / "avbert_state_dict.csv").read_bytes(), mtime=0)
    (HERE / "avbert_state_dict.csv.gz").write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
