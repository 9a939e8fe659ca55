"""Steps whose gradients are not finite: found out and undone, and in float16 avoided; all of it on the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_FIRST, _LARGEST = 2.0**12, 2.0**24  # at 2^16 the first steps of the tiny preset are too large
_GROWTH_STEPS = 2000


class FiniteSteps:
    """What the device knows of the steps: whether they were finite, and the buffers as of the last that was.

    Only `read` waits for the device. What is not finite goes into BatchNorm's averages too, and would stay there.

    Args:
        modules: whose buffers are kept.
        device: of the loss.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        self._in_a_row, self._skipped = torch.zeros((), device=device), torch.zeros((), device=device)
        of_type: dict[torch.dtype, list[Tensor]] = {}
        for buffer in (buffer for module in modules for buffer in module.buffers()):
            of_type.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = [(buffers, _joined(buffers)) for buffers in of_type.values()]

    @torch.no_grad()
    def after(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Count the step; where it was not finite, take the buffers back. 1 if it is to be skipped, else 0: where it
        was not finite, or where no gradient came, as of clips that can't be read."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        for buffers, good in self._buffers:
            good.copy_(torch.where(bad, good, _joined(buffers)))
            _scatter(good, buffers)
        self._in_a_row = (self._in_a_row + 1) * bad
        skipped = bad | (norm == 0)
        self._skipped = self._skipped + skipped
        return skipped.float()

    @torch.no_grad()
    def take_back(self) -> None:
        """Give the buffers the values that they had after the last step that was finite."""
        for buffers, good in self._buffers:
            _scatter(good, buffers)

    def read(self) -> tuple[int, int]:
        """(the last steps in a row that were not finite, all that were skipped since it was read before)."""
        found = int(self._in_a_row), int(self._skipped)
        self._skipped = torch.zeros_like(self._skipped)
        return found


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _scatter(joined: Tensor, to: list[Tensor]) -> None:
    parts = joined.split([tensor.numel() for tensor in to])
    torch._foreach_copy_(to, [part.view_as(one) for part, one in zip(parts, to, strict=True)])


class LossScale:
    """The factor of the losses in float16, where small gradients would vanish: halved after a step whose gradients were
    too large, doubled after 2000 in a row that were not. It is a power of two, so that scaling rounds nothing.

    Nothing waits for the device.

    Args:
        device: of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        self._scale = torch.full((), _FIRST, device=device)
        self._good_steps = torch.zeros((), device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to go backward from."""
        return loss * self._scale

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, self._scale.reciprocal())

    @torch.no_grad()
    def after(self, norm: Tensor) -> None:
        """Adapt the scale to a step whose gradients had this norm."""
        bad = (~torch.isfinite(norm)).float()
        good_steps = (self._good_steps + 1) * (1 - bad)
        grows = good_steps >= _GROWTH_STEPS
        factor = torch.where(bad > 0, 0.5, torch.where(grows, 2.0, 1.0))
        # In place: a step that was captured as a graph finds them where they were.
        self._scale.mul_(factor).clamp_(1.0, _LARGEST)
        self._good_steps.copy_(torch.where(grows, 0.0, good_steps))

    def state(self) -> dict[str, Tensor]:
        """What `load` takes back."""
        return {"scale": self._scale, "good_steps": self._good_steps}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        self._scale.copy_(state["scale"])
        self._good_steps.copy_(state["good_steps"])
