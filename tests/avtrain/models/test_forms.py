"""The forms that operations take on CUDA compute the same functions; here on the CPU, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from avtrain.models import forms
from avtrain.models.cnn import Pool3d, stage3d
from avtrain.models.lowrank import scaled_and_squared

LAYOUT = torch.channels_last_3d


@pytest.mark.parametrize(("frames", "taps", "extent", "side"), [(32, 5, 7, 112), (7, 5, 7, 24), (8, 3, 5, 16),
                                                                (6, 1, 7, 16)])
def test_stem(frames: int, taps: int, extent: int, side: int) -> None:
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, frames, side, side + 4).double()
    weight = torch.randn(8, 3, taps, extent, extent).double().requires_grad_()
    plain = F.conv3d(pixels, weight, stride=(2, 2, 2), padding=(taps // 2, extent // 2, extent // 2))
    ours = forms.stem_convolution(pixels, weight)
    torch.testing.assert_close(ours, plain)
    assert ours.is_contiguous(memory_format=LAYOUT)
    gradients = [torch.autograd.grad(y.square().sum(), weight)[0] for y in (ours, plain)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("pointwise", ["plain", "convolution", "linear"])
@pytest.mark.parametrize(("kernel", "stride"), [((1, 3, 3), (1, 2, 2)), ((1, 3, 3), (1, 1, 1)), ((1, 1, 1), (1, 2, 2)),
                                                ((1, 1, 1), (1, 1, 1)), ((3, 1, 1), (1, 1, 1)), ((5, 1, 1), (8, 1, 1)),
                                                ((5, 7, 7), (1, 2, 2))])
def test_convolution(kernel: tuple[int, int, int], stride: tuple[int, int, int], pointwise: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 8, 8, 8).double().contiguous(memory_format=LAYOUT).requires_grad_()
    weight = torch.randn(8, 16, *kernel).double().contiguous(memory_format=LAYOUT).requires_grad_()
    padding = [size // 2 for size in kernel]
    plain = F.conv3d(x, weight, stride=stride, padding=padding)
    with forms.using(pointwise=pointwise):
        ours = forms.convolution(x, weight, stride, padding)
    torch.testing.assert_close(ours, plain)
    assert kernel == (5, 7, 7) or pointwise == "plain" or ours.is_contiguous(memory_format=LAYOUT)
    target = torch.randn_like(plain)
    gradients = (torch.autograd.grad(y, (x, weight), target) for y in (ours, plain))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_pool() -> None:
    x = torch.randn(2, 16, 4, 9, 8).contiguous(memory_format=LAYOUT)
    assert torch.equal(forms.pool(x), Pool3d()(x)) and forms.pool(x).is_contiguous(memory_format=LAYOUT)


def test_stem_takes_bytes() -> None:
    torch.manual_seed(0)
    pixels, weight = torch.randint(0, 256, (2, 3, 6, 16, 12), dtype=torch.uint8), torch.randn(4, 3, 5, 7, 7)
    torch.testing.assert_close(forms.stem_convolution(pixels, weight),
                               forms.stem_convolution(forms.normalized(pixels), weight))


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
def test_exponential_without_waiting(scale: float) -> None:
    torch.manual_seed(0)
    random = torch.randn(3, 64, 64) * scale / 4
    skew = random - random.mT
    exact = torch.linalg.matrix_exp(skew.double())
    torch.testing.assert_close(scaled_and_squared(skew).double(), exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled_and_squared(skew.double()), exact, atol=1e-9, rtol=0)
    towards = torch.complex(skew.double(), 1e-9 * torch.randn(3, 64, 64).double())
    torch.testing.assert_close(scaled_and_squared(towards).imag, torch.linalg.matrix_exp(towards).imag, atol=1e-15,
                               rtol=1e-6)


def test_a_forked_map_gets_both_gradients() -> None:
    """Without our kernels too, bottlenecks hand on their maps twice."""
    torch.manual_seed(0)
    stage = stage3d(8, 4, 3, 3, 2).double().train()
    x = torch.randn(2, 8, 4, 8, 8).double().requires_grad_()
    plain = x
    for block in stage:
        plain = torch.relu(block.branch(plain) + block.shortcut(plain))
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (stage(x), plain)]
    torch.testing.assert_close(*gradients)
