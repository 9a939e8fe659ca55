"""Part 3: how fast the kernels of BatchNorm, shortcut and ReLU move bytes, by the size of their tiles."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from avtrain.config import Config
from avtrain.models.avbert import AVBert
from avtrain.models.cnn import Residual
from benchmarks.gpu.device import seconds_of
from benchmarks.gpu.report import Figures, Report
from benchmarks.gpu.steps import Bench

# (rows, most channels, warps) of a tile
TILES = ((64, 64, 4), (32, 64, 4), (16, 128, 4), (8, 256, 4))
_SEGMENTS = 96
# (segments, frames, height and width, channels), and whether a shortcut is added and the result used twice
_MAPS = ((16, 56, 64, False), (16, 28, 64, False), (16, 28, 256, True), (16, 14, 512, True), (16, 14, 256, False),
         (16, 7, 1024, True))


def run(report: Report, bench: Bench, clips: int) -> None:
    """The least that the kernels can take, and a row for each tile."""
    device, rate = bench.device, report.content.get("copy_gb_per_s", math.nan)
    report.measure(f"norm kernels' bytes, {clips} clips", lambda: traffic(bench.config, clips, rate))
    from avtrain.models import norm_kernels

    before = norm_kernels.TILE
    for rows, channels, warps in TILES:
        norm_kernels.TILE = norm_kernels.Tile(rows, channels, warps)
        report.measure(f"norm kernels, tiles of {rows} x {channels}, {warps} warps, GB/s", lambda: speeds(device), 2)
    norm_kernels.TILE = before


def traffic(config: Config, clips: int, gb_per_s: float) -> Figures:
    """GB that BatchNorm, shortcut and ReLU must read and write in a step, and milliseconds at the speed of a copy.

    Forwards, a map is read twice and written once, and its shortcut read; backwards, map and gradient are read twice
    and a gradient is written; with a shortcut, the result and a second gradient are read and a gradient is written too.
    """
    elements = {"alone": 0, "shortcut": 0}
    model = AVBert(config.model).train()
    last = [list(module.branch.children())[-1] for module in model.modules() if isinstance(module, Residual)]

    def seen(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        elements["shortcut" if any(module is one for one in last) else "alone"] += inputs[0].numel()

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(seen)
    data = config.data
    with torch.no_grad():
        model.embed(torch.randn(1, 1, 3, data.segment_frames, data.crop, data.crop),
                    torch.randn(1, 1, 1, data.mels, data.mel_frames))
    each = 2e-9 * clips * data.segments
    forward, backward = (each * (alone * elements["alone"] + shortcut * elements["shortcut"])
                         for alone, shortcut in ((3, 4), (5, 8)))
    return {"forward_gb": forward, "backward_gb": backward, "floor_ms": 1000 * (forward + backward) / gb_per_s}


def speeds(device: torch.device) -> Figures:
    """GB/s, forwards and backwards, all maps together, and of each; bytes that must be read and written count."""
    from avtrain.models.norm_kernels import FusedNorm

    taken, moved, each = [0.0, 0.0], [0.0, 0.0], {}
    for frames, side, channels, shortcut in _MAPS:
        shape = (_SEGMENTS, channels, frames, side, side)
        x, other, up = (torch.randn(shape, device=device, dtype=torch.bfloat16).contiguous(
            memory_format=torch.channels_last_3d) for _ in range(3))
        weight, bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)
        mean, variance = torch.zeros(channels, device=device), torch.ones(channels, device=device)
        inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)] + (
            [other.requires_grad_()] if shortcut else [])

        def forward(x: Any = x, other: Any = other, weight: Any = weight, bias: Any = bias, mean: Any = mean,
                    variance: Any = variance, shortcut: bool = shortcut) -> Any:
            return FusedNorm.apply(x, other if shortcut else None, weight, bias, mean, variance, 0.1, 1e-5, True,
                                   shortcut)

        y = forward()
        outputs, above = (y, (up, up.clone())) if shortcut else ((y,), (up,))
        seconds = [seconds_of(forward, device, 5), seconds_of(
            lambda outputs=outputs, above=above, inputs=inputs: torch.autograd.grad(  # type: ignore[misc]
                outputs, inputs, above, retain_graph=True), device, 5)]
        size = x.numel() * 2
        bytes_moved = [size * (4 if shortcut else 3), size * (8 if shortcut else 5)]
        taken = [total + one for total, one in zip(taken, seconds, strict=True)]
        moved = [total + one for total, one in zip(moved, bytes_moved, strict=True)]
        each[f"{frames}x{side}x{side}x{channels}"] = [
            round(one / second / 1e9) for one, second in zip(bytes_moved, seconds, strict=True)]
    return {"forward": moved[0] / taken[0] / 1e9, "backward": moved[1] / taken[1] / 1e9, "each": each}
