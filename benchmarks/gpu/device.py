"""Part 1: what is there, and how fast it can be at best."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Callable
from time import perf_counter

import torch

from benchmarks.gpu.report import Figures

NOMINAL_TFLOPS = 989.0  # an H100's dense bfloat16, by its data sheet


def synchronize(device: torch.device) -> None:
    """Wait for all that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    """Median seconds of a call, after two that warm up."""
    function(), function()
    taken = []
    for _ in range(rounds):
        synchronize(device)
        began = perf_counter()
        function()
        synchronize(device)
        taken.append(perf_counter() - began)
    return statistics.median(taken)


def versions(device: torch.device) -> Figures:
    """Of what decides the figures."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda),
             "cudnn": str(torch.backends.cudnn.version())}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "none"
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"card": card.name, "memory_gib": f"{card.total_memory / 2**30:.1f}",
                  "multiprocessors": str(card.multi_processor_count), "driver": _driver()}
    return found


def _driver() -> str:
    try:
        return subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], check=True,
                              capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def product_ceiling(device: torch.device) -> Figures:
    """A large bfloat16 matrix product of random numbers."""
    size = 8192 if device.type == "cuda" else 256
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {"tflops": 2 * size**3 / seconds_of(lambda: left @ right, device) / 1e12, "size": size}


def copy_ceiling(device: torch.device) -> Figures:
    """A large copy on the device; bytes read and bytes written count."""
    size = 2**32 if device.type == "cuda" else 2**22
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"gb_per_s": 2 * size / seconds_of(lambda: target.copy_(source), device) / 1e9}
