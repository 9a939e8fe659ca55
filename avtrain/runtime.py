"""Where and how precisely things are computed: device, autocast, seeds."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avtrain import ranks
from avtrain.errors import AvtrainError, in_a_line

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": None, "float64": None}


@dataclass(frozen=True)
class Runtime:
    """Device, number type of autocast (None: that of the weights throughout), and of weights."""

    device: torch.device
    autocast_dtype: torch.dtype | None
    dtype: torch.dtype = torch.float32

    @property
    def scaled(self) -> bool:
        """Whether losses are scaled in training: small gradients would vanish in float16."""
        return self.autocast_dtype == torch.float16

    def autocast(self) -> AbstractContextManager[object]:
        """The context that forward passes run in."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)


def choose_runtime(device: str | None, precision: str) -> Runtime:
    """The device (None: a GPU if there is one; of several processes, each one its own) and precision (auto: the fastest
    that the hardware itself has; float64 is for tests).

    Raises:
        AvtrainError: there is no such device.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        _, count, local = ranks.started_with()
        if count > 1 and chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", local)
            torch.cuda.set_device(chosen)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise AvtrainError(f"--device {device}: {in_a_line(error)}") from error
    autocast_dtype = _fastest(chosen) if precision == "auto" else PRECISIONS[precision]
    return Runtime(chosen, autocast_dtype, torch.float64 if precision == "float64" else torch.float32)


def _fastest(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the hardware computes in it, not just emulates it; else float16 on GPUs with tensor cores."""
    if device.type != "cuda":
        return torch.bfloat16 if _cpu_has_bfloat16() else None
    if torch.version.hip:
        return torch.bfloat16
    generation = torch.cuda.get_device_capability(device)
    if generation >= (8, 0):
        return torch.bfloat16
    return torch.float16 if generation >= (7, 0) else None


def _cpu_has_bfloat16() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return any("avx512_bf16" in line or "amx_bf16" in line for line in file)
    except OSError:
        return False


def seed_everything(seed: int) -> None:
    """Seed the global generators: start weights, dropout. What else is drawn follows from seed, step and place."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def at_least_float32(values: Tensor) -> Tensor:
    """float64 stays, and what is less precise becomes float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def without_autocast(values: Tensor) -> AbstractContextManager[object]:
    """The context for operations on these that keep the types they are given. Meta tensors have no autocast."""
    return nullcontext() if values.is_meta else torch.autocast(values.device.type, enabled=False)
