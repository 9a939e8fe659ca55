"""CUDA graphs: a step's thousands of kernels are launched by a few calls, so that the device doesn't wait for the host.

Sizes are fixed: all segments present, always as many clips, training mode; what has others runs without. The graphs'
gradients lie at fixed places, which the next part overwrites: see `own_gradients`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from avtrain.models.avbert import AVBert, Tokens

Forward = Callable[..., Any]


class _Transformers(nn.Module):
    """`AVBert.contextualize` as a module that owns its parameters alone."""

    def __init__(self, model: AVBert) -> None:
        super().__init__()
        apart = ("visual_cnn", "audio_cnn", "visual_projection", "audio_projection", "visual_norm", "audio_norm")
        self.parts = nn.ModuleDict({name: part for name, part in model.named_children() if name not in apart})
        self.loose = nn.ParameterList(model.parameters(recurse=False))
        self._contextualize: Any = model.contextualize

    def forward(self, *inputs: Tensor) -> Tokens:
        """As `AVBert.contextualize`."""
        tokens: Tokens = self._contextualize(*inputs)
        return tokens


def capture(model: AVBert, visual: Tensor, audio: Tensor, draws: int, precision: torch.dtype | None,
            transformers: bool) -> None:
    """From now on the model's CNNs, and its Transformers if asked for, run as graphs, forwards and backwards, where
    they get as much as here and are trained; anything else runs as before.

    BatchNorm's statistics and the random state are as before: what the warm-up did to them is taken back.

    Args:
        model: on the device, in training mode; it must outlive the graphs.
        visual, audio: a batch as the CNNs get it, (clips, segments, ...).
        draws: masked copies of a batch that the Transformers get.
        precision: of autocast; None: float32.
    """
    clips, segments = visual.shape[:2]
    modules: list[nn.Module] = [model.visual_cnn, model.audio_cnn]
    # Copies: a graph reads its inputs from where the samples lie, and whatever it gets is written there.
    samples: list[tuple[Tensor, ...]] = [(visual.flatten(0, 1).clone(),), (audio.flatten(0, 1).clone(),)]
    if transformers:
        modules.append(_Transformers(model).train(model.training))
        local = (torch.randn(draws * clips, segments, model.config.dimension, device=visual.device, requires_grad=True)
                 for _ in range(2))
        present = (torch.ones(draws * clips, segments, dtype=torch.bool, device=visual.device) for _ in range(2))
        samples.append((*local, *present))
    before, plain = [buffer.clone() for buffer in model.buffers()], [module.forward for module in modules]
    with (torch.random.fork_rng([visual.device]),
          torch.autocast(visual.device.type, precision, enabled=precision is not None, cache_enabled=False)):
        torch.cuda.make_graphed_callables(tuple(modules), tuple(samples), allow_unused_input=True)
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
    for module, otherwise, sample in zip(modules, plain, samples, strict=True):
        module.forward = _where_it_fits(module.forward, otherwise, sample)
    if transformers:
        graphed = modules[2]
        model.contextualize = lambda *inputs: graphed(*inputs)  # type: ignore[method-assign]


def own_gradients(module: nn.Module) -> None:
    """Give every parameter a gradient of zero in memory of its own, to be kept by `zero_grad(set_to_none=False)`.

    A parameter without one takes the first that comes as it is: with graphs the place that the next part's gradient is
    written to, and the sum of two parts would be twice the second.
    """
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)


def _where_it_fits(graphed: Forward, otherwise: Forward, sample: tuple[Tensor, ...]) -> Forward:
    """The graph for inputs like the sample, while gradients are wanted; the plain form for all others."""
    def forward(*inputs: Tensor) -> Any:
        same = all(one.shape == other.shape and one.dtype == other.dtype
                   for one, other in zip(inputs, sample, strict=True))
        return (graphed if same and torch.is_grad_enabled() else otherwise)(*inputs)

    return forward
