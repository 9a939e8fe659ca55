"""What CUDA graphs ask of the loop, shown without a GPU."""

import pytest
import torch
from torch import nn

from avtrain.models.graphs import own_gradients


class _Graphed(torch.autograd.Function):
    """x * weight, whose gradient of the weight always lies at the same place, as that of a replayed graph does."""

    place = torch.zeros(4)

    @staticmethod
    def forward(ctx, weight, x):
        ctx.save_for_backward(x)
        return weight * x

    @staticmethod
    def backward(ctx, gradient):
        _Graphed.place.copy_(gradient * ctx.saved_tensors[0])
        return _Graphed.place.detach(), None


@pytest.mark.parametrize("own", [True, False])
def test_gradients_of_parts_add_up_where_parameters_own_theirs(own):
    """Without, the sum is twice the last part: that it was, on a GPU, is why this is tested."""
    module = nn.ParameterList([nn.Parameter(torch.ones(4))])
    if own:
        own_gradients(module)
    for step in range(3):
        for part in (1.0, 10.0):
            _Graphed.apply(module[0], torch.full((4,), part + step)).sum().backward()
        right = torch.full((4,), 11.0 + 2 * step)
        assert torch.equal(module[0].grad, right) == own
        module.zero_grad(set_to_none=False)
