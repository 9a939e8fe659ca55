"""Fixtures: the shared reference data, and the authors' weights redrawn by the rules that come with it."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from redrawn import drawn
from torch import Tensor

SHARED = Path(os.environ.get("AV_SHARED", Path(__file__).parents[2].parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "reference").is_dir():
        pytest.skip(f"no reference data in {SHARED}; set AV_SHARED to the folder that holds reference/")
    return SHARED


@pytest.fixture(scope="session")
def released_state(shared: Path) -> dict[str, Tensor]:
    """The state dict of the authors' Kinetics-Sounds model, redrawn."""
    state = {}
    with (shared / "reference" / "avbert_state_dict.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            shape = tuple(int(size) for size in row["shape"].split("x") if size)
            state[row["name"]] = drawn(row["name"], shape, "weight").to(getattr(torch, row["dtype"]))
    return state


@pytest.fixture(scope="session")
def reference(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "reference" / "avbert_outputs.npz") as file:
        return dict(file)
