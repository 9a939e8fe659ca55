"""Part 2: are the numbers right: against float64 on the CPU, and against what the released code gave."""

from __future__ import annotations

import contextlib
import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avtrain.checkpoints.authors import load_released
from avtrain.config import Config
from avtrain.models import forms
from avtrain.models.avbert import AVBert
from avtrain.models.cnn import Conv2d, Conv3d
from benchmarks.gpu import parts
from benchmarks.gpu.report import Figures, Report
from benchmarks.gpu.steps import PLAIN
from benchmarks.gpu.whole import half_precision, relative, single_precision

CONVOLUTION = 0.01  # largest relative error


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 in products or convolutions."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def run(report: Report, config: Config, device: torch.device, reference: Path | None) -> None:
    """All rows of this part."""
    with exact_float32():
        half_precision(report, config, device)
        for name, figures in convolutions(config, device):
            report.measure(name, figures)
        if device.type == "cuda":
            report.measure("BatchNorm + shortcut + ReLU in one, against float64", lambda: fused_norms(device))
            report.measure("stem's input and pooling by our kernels, float32", lambda: stem(device))
            parts.run(report, config, device)
        if reference is not None:
            report.measure("the released code's outputs, float32", lambda: released(reference, device))
        single_precision(report, config, device)


def released(reference: Path, device: torch.device) -> Figures:
    """Largest differences from the arrays that the released code gave for weights and inputs drawn from their names."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "avtrain"))
    from redrawn import drawn

    state = {}
    with (reference / "avbert_state_dict.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            shape = tuple(int(size) for size in row["shape"].split("x") if size)
            state[row["name"]] = drawn(row["name"], shape, "weight").to(getattr(torch, row["dtype"]))
    model = load_released(state).to(device)
    visual = drawn("input.visual", (1, 3, 3, 32, 112, 112)).float().to(device)
    audio = drawn("input.audio", (1, 3, 1, 80, 128)).float().to(device)
    with torch.no_grad():
        output = model(visual, audio)
    with np.load(reference / "avbert_outputs.npz") as file:
        errors = {}
        for name, value in output._asdict().items():
            if name in file:
                wanted = torch.from_numpy(file[name]).to(device)
                errors[name] = float((value.flatten() - wanted.flatten()).abs().max())
    return {"largest": max(errors.values()), "of": len(errors), "ok": max(errors.values()) <= 1e-4, "each": errors}


def convolutions(config: Config, device: torch.device) -> Iterator[tuple[str, Any]]:
    """A measure for each form: bfloat16 forward, input and weight gradient of every distinct shape."""
    shapes = convolution_shapes(config)
    yield f"{len(shapes)} convolutions, bfloat16, plain forms", lambda: worst_errors(shapes, device, PLAIN)
    if device.type == "cuda":
        yield f"{len(shapes)} convolutions, bfloat16, 2-D forms", lambda: worst_errors(shapes, device, {})
        linear = {"pointwise": "linear"}
        yield f"{len(shapes)} convolutions, bfloat16, 1x1x1 linear", lambda: worst_errors(shapes, device, linear)


def convolution_shapes(config: Config) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """By description, a convolution of every distinct kernel, stride, channels and map size, and its input's shape."""
    found: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}

    def seen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, Conv2d | Conv3d)
        shape = tuple(inputs[0].shape)
        kernel, stride = ("x".join(map(str, of)) for of in (module.kernel_size, module.stride))
        found.setdefault(f"{module.in_channels}-{module.out_channels} {kernel} /{stride} on "
                         f"{'x'.join(map(str, shape[2:]))}", (module, shape))

    data = config.data
    model = AVBert(config.model)
    hooks = [module.register_forward_pre_hook(seen) for module in model.modules()
             if isinstance(module, Conv2d | Conv3d)]
    with torch.no_grad():
        model.embed(torch.randn(1, 2, 3, data.segment_frames, data.crop, data.crop),
                    torch.randn(1, 2, 1, data.mels, data.mel_frames))
    for hook in hooks:
        hook.remove()
    return found


def worst_errors(shapes: dict[str, tuple[nn.Module, tuple[int, ...]]], device: torch.device,
                 form: dict[str, Any]) -> Figures:
    """Largest relative errors over all shapes, and which shapes are above the limit."""
    worst = {"forward": 0.0, "input": 0.0, "weight": 0.0}
    bad: list[str] = []
    for name, (module, shape) in shapes.items():
        errors = _errors(module, shape, device, form)
        worst = {kind: max(worst[kind], error) if error == error else error for kind, error in errors.items()}
        if not max(errors.values()) <= CONVOLUTION:
            bad.append(f"{name}: {errors}")
    return {**worst, "wrong": len(bad), "ok": not bad, "which": bad}


def _errors(module: nn.Module, shape: tuple[int, ...], device: torch.device, form: dict[str, Any]) -> dict[str, float]:
    assert isinstance(module, Conv2d | Conv3d)
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    spread = module.weight[0].numel() ** -0.5
    weight = (torch.randn(module.weight.shape, device=device) * spread).bfloat16()
    x = torch.randn(shape, device=device).bfloat16().contiguous(memory_format=layout)
    ours = type(module)(module.in_channels, module.out_channels, module.kernel_size, module.stride,  # type: ignore[arg-type]
                        module.padding, bias=False).to(device, torch.bfloat16)  # type: ignore[arg-type]
    ours.weight.data = weight.contiguous(memory_format=layout)
    x.requires_grad_()
    with forms.using(**form):
        if form != PLAIN and device.type == "cuda" and module.stride == (2, 2, 2):
            y = forms.stem_convolution(x, ours.weight)
        else:
            y = ours(x)
        gradient = torch.randn(y.shape, device=device).bfloat16()
        y.backward(gradient)
    exact_x, exact_weight = x.detach().double().requires_grad_(), weight.double().requires_grad_()
    convolve = F.conv2d if len(shape) == 4 else F.conv3d
    with torch.backends.cudnn.flags(enabled=False):
        exact = convolve(exact_x, exact_weight, None, module.stride, module.padding)  # type: ignore[arg-type]
        exact.backward(gradient.double())
    pairs = {"forward": (y, exact), "input": (x.grad, exact_x.grad), "weight": (ours.weight.grad, exact_weight.grad)}
    return {kind: relative(one.double(), other) for kind, (one, other) in pairs.items()
            if one is not None and other is not None}


def fused_norms(device: torch.device) -> Figures:
    """Largest relative errors of outputs, gradients and running statistics, float32 and bfloat16."""
    errors: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((4, 64, 8, 28, 28), (3, 2048, 4, 4, 4), (2, 32, 80, 128)):
            for with_shortcut in (False, True):
                for relu in (False, True):
                    for fork in (False, True) if with_shortcut and relu else (False,):
                        error = _norm_error(shape, dtype, with_shortcut, relu, fork, device)
                        name = f"{dtype}"[6:]
                        errors[name] = max(errors.get(name, 0.0), error)
    return {**errors, "ok": errors["float32"] < 1e-5 and errors["bfloat16"] < 1e-2}


def stem(device: torch.device) -> Figures:
    """Our kernels for the stem's input and its pooling against torch's: largest relative errors."""
    pixels = torch.randint(0, 256, (3, 3, 32, 112, 112), dtype=torch.uint8, device=device)
    weight = torch.randn(64, 3, 5, 7, 7, device=device) * 0.03
    outputs = []
    for kernels in (True, False):
        with forms.using(kernels=kernels):
            outputs.append(forms.stem_convolution(pixels, weight))
    x = outputs[1].relu().detach().requires_grad_()
    pooled, gradients = [], []
    for kernels in (True, False):
        with forms.using(kernels=kernels):
            pooled.append(forms.pool(x))
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(pooled[-1], x, torch.randn(pooled[-1].shape, device=device))[0])
    errors = {name: relative(*pair) for name, pair in (("input", outputs), ("pooling", pooled),
                                                       ("pooling_gradient", gradients))}
    return {**errors, "ok": max(errors.values()) < 1e-5}


def _norm_error(shape: tuple[int, ...], dtype: torch.dtype, with_shortcut: bool, relu: bool,
                fork: bool, device: torch.device) -> float:
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm3d)(shape[1]).to(device)
    nn.init.normal_(norm.weight, 1, 0.2)
    nn.init.normal_(norm.bias, 0, 0.2)
    exact = type(norm)(shape[1]).to(device).double()
    exact.load_state_dict(norm.state_dict())
    x = (torch.randn(shape, device=device) * 2 + 3).to(dtype).requires_grad_()
    shortcut = torch.randn(shape, device=device).to(dtype).requires_grad_() if with_shortcut else None
    inputs = [tensor for tensor in (x, shortcut) if tensor is not None]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y = forms.fused_norm(x, norm, shortcut, relu, fork)
    outputs = y if fork else (y,)
    y = outputs[0]
    wanted = exact(doubles[0]) + (doubles[1] if with_shortcut else 0)
    if relu:  # by our own mask: near zero, rounding decides
        wanted = wanted * (y > 0)
    gradients = [torch.randn(shape, device=device).to(dtype) for _ in outputs]
    torch.autograd.backward(outputs, gradients)
    wanted.backward(sum(gradient.double() for gradient in gradients))
    pairs = [(y, wanted), (norm.weight.grad, exact.weight.grad), (norm.bias.grad, exact.bias.grad),
             (norm.running_mean, exact.running_mean), (norm.running_var, exact.running_var),
             *((one.grad, other.grad) for one, other in zip(inputs, doubles, strict=True))]
    return max(relative(one.detach().double(), other.detach()) for one, other in pairs
               if one is not None and other is not None)
