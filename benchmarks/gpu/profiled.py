"""Where the time of a step goes: by phase, and by group of kernels."""

from __future__ import annotations

import re
from time import perf_counter

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.device import synchronize
from benchmarks.gpu.report import Figures
from benchmarks.gpu.steps import Bench, Setting, is_annotation

_STEPS = 3
# The first pattern that a kernel's name matches is its group.
_GROUPS = (
    ("norm, shortcut, ReLU (ours)", r"^_(moments|finish|apply|gradient)"),
    ("stem's input and pooling (ours)", r"^_(pack|pool|unpool)"),
    ("batch norm", r"batch_?norm|bn_fw|bn_bw"),
    ("pooling", r"pool"),
    ("convolution, weight gradient", r"wgrad|backward_filter|backwardfilter"),
    ("convolution, input gradient", r"dgrad|backward_data|backwarddata|bprop"),
    ("convolution, forward", r"fprop|convolv|conv2d|conv3d|implicit"),
    ("layout changes", r"nchwto|nhwcto|nchw_to|transpose|permut"),
    ("matrix products", r"gemm|nvjet|cutlass|gemv|splitk|cublas"),
    ("optimiser and clipping", r"multi_tensor|adam|foreach"),
    ("attention", r"flash|fmha|attention|softmax"),
    ("layer norm", r"layer_?norm"),
    ("copies", r"memcpy|memset|copy"),
    ("sorting, selection", r"sort|topk|radix|scan|select|gather|scatter|index"),
    ("elementwise", r"elementwise|vectorized|triton_poi|triton_red|triton_per"),
    ("reductions", r"reduce"),
)


def phases(bench: Bench, setting: Setting) -> Figures:
    """Milliseconds of each phase, the host waiting for the device after each."""
    batch = tuple(tensor[:setting.clips] for tensor in bench.batch)
    with bench.running(setting) as step:
        step(batch), step(batch)
        taken: dict[str, float] = {}
        for _ in range(_STEPS):
            synchronize(bench.device)
            last = perf_counter()

            def mark(name: str) -> None:
                nonlocal last
                synchronize(bench.device)
                now = perf_counter()
                taken[name] = taken.get(name, 0.0) + 1000 * (now - last) / _STEPS
                last = now

            step(batch, mark)
    return dict(taken)


def kernels(bench: Bench, setting: Setting) -> Figures:
    """Milliseconds of a step by group of kernels, the device's idle share, and the longest kernels (in the JSON)."""
    batch = tuple(tensor[:setting.clips] for tensor in bench.batch)
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.device.type == "cuda" else [])
    with bench.running(setting) as step:
        for _ in range(3):
            step(batch)
        synchronize(bench.device)
        began = perf_counter()
        for _ in range(_STEPS):
            step(batch)
        synchronize(bench.device)
        wall_ms = 1000 * (perf_counter() - began) / _STEPS
        with profile(activities=kinds) as found:
            for _ in range(_STEPS):
                step(batch)
            synchronize(bench.device)
    of_kernel: dict[str, tuple[float, int]] = {}
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not is_annotation(event):
            ms, count = of_kernel.get(event.name, (0.0, 0))
            of_kernel[event.name] = (ms + event.time_range.elapsed_us() / 1000 / _STEPS, count + 1)
    groups: dict[str, float] = {}
    for name, (ms, _) in of_kernel.items():
        group = next((group for group, pattern in _GROUPS if re.search(pattern, name.lower())), "other")
        groups[group] = groups.get(group, 0.0) + ms
    busy_ms = sum(groups.values())
    launched = {"cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch"}
    calls = sum(event.name in launched for event in found.events())
    longest = sorted(of_kernel.items(), key=lambda item: -item[1][0])[:60]
    return {"step_ms": wall_ms, "kernels_ms": busy_ms, "idle_share": 1 - busy_ms / wall_ms,
            "host_launches": calls // _STEPS, "kernels": sum(count for _, count in of_kernel.values()) // _STEPS,
            **{group: ms for group, ms in sorted(groups.items(), key=lambda item: -item[1])},
            "longest": [[name[:160], round(ms, 3), count // _STEPS] for name, (ms, count) in longest]}
