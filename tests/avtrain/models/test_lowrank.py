"""The factored layer against a plain composition in float64, and its rotations after many steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from avtrain.models.lowrank import LowRankLinear, SharedLinear, rotation_blocks, rotation_of

MAPS, TRANSFORMERS, RANK, INPUTS, OUTPUTS = 3, 2, 4, 6, 5


@pytest.fixture
def layer() -> LowRankLinear:
    torch.manual_seed(0)
    layer = LowRankLinear(INPUTS, OUTPUTS, RANK, TRANSFORMERS, MAPS).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def composed(x: Tensor, down: Tensor, skew: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """y = U ( normalize(V x) R ) + b for one map, as the paper writes it; the exponential as a power series."""
    upper = torch.triu(skew, diagonal=1)
    generator = upper - upper.transpose(0, 1)
    rotation = term = torch.eye(RANK, dtype=x.dtype)
    for power in range(1, 40):
        term = term @ generator / power
        rotation = rotation + term
    hidden = torch.matmul(x, down.transpose(0, 1))
    hidden = hidden / torch.sqrt(torch.sum(hidden * hidden, -1, keepdim=True))
    return torch.matmul(torch.matmul(hidden, rotation), up.transpose(0, 1)) + bias


def factored(layer: LowRankLinear, x: Tensor) -> Tensor:
    """(transformers, maps, batch, length, outputs)."""
    return torch.stack([folded.apply(x) for folded in layer.fold(rotation_of(layer.skew))])


def test_values_and_gradients_equal_the_plain_composition(layer: LowRankLinear) -> None:
    x = torch.randn(2, 3, INPUTS, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(TRANSFORMERS, MAPS, 2, 3, OUTPUTS, dtype=torch.float64)
    leaves = [x, *layer.parameters()]
    ours = factored(layer, x)
    plain = torch.stack([torch.stack([
        composed(x, layer.private[t, m * RANK:(m + 1) * RANK], layer.skew[t, m], layer.shared[m],
                 layer.bias[m * OUTPUTS:(m + 1) * OUTPUTS]) for m in range(MAPS)]) for t in range(TRANSFORMERS)])
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad((ours * weight).sum(), leaves),
                            torch.autograd.grad((plain * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_gradcheck(layer: LowRankLinear) -> None:
    x = torch.randn(1, 1, INPUTS, dtype=torch.float64, requires_grad=True)
    names = [f"layer.{name}" for name, _ in layer.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(_Whole(layer), given, (x,))  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(function, (x, *layer.parameters()))


class _Whole(torch.nn.Module):
    def __init__(self, layer: LowRankLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return factored(self.layer, x)


def test_unfactored_layer_is_a_linear_layer() -> None:
    layer, x = SharedLinear(INPUTS, OUTPUTS, MAPS), torch.randn(2, 3, INPUTS)
    torch.nn.init.normal_(layer.bias)
    first, second = layer.fold(2)
    expected = torch.stack([torch.nn.functional.linear(x, weight, bias)
                            for weight, bias in zip(layer.weight, layer.bias.view(MAPS, -1), strict=True)])
    torch.testing.assert_close(first.apply(x), expected)
    torch.testing.assert_close(second.apply(x), expected)


@pytest.mark.seconds
@pytest.mark.parametrize("autocast", [pytest.param(False, marks=pytest.mark.slow), True])
def test_rotations_stay_orthogonal(autocast: bool) -> None:
    torch.manual_seed(0)
    rank = 128
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices: threads only wait for each other
    layer = LowRankLinear(32, 16, rank, transformers=2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, amsgrad=True)
    x, target = torch.randn(1, 8, 32), torch.randn(2, 1, 1, 8, 16)
    start = layer.skew.detach().clone()
    for _ in range(300):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = (factored(layer, x).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    assert (layer.skew - start).abs().max() > 0.1  # they did turn
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rotation = rotation_of(layer.skew.detach())
    assert rotation.dtype == torch.float32
    assert (rotation.mT @ rotation - torch.eye(rank)).abs().max() < 1e-5


def test_start_values_are_blocks_of_half_turned_angles() -> None:
    blocks = rotation_blocks(3, 6)
    assert torch.equal(blocks, -blocks.mT)
    entry = blocks.diagonal(offset=1, dim1=1, dim2=2)
    assert (entry[:, 1::2] == 0).all() and (entry[:, ::2] <= 0).all() and (entry[:, ::2] > -1).all()
    assert torch.count_nonzero(blocks.triu(2)) == 0
