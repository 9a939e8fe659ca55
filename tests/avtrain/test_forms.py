"""The forms that operations take on CUDA compute the same functions; here on the CPU, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from avtrain.models import forms
from avtrain.models.cnn import Pool3d

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
