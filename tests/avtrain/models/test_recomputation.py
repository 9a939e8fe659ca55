"""Stages that run again in the backward pass change nothing: losses, gradients, averages; and measure nothing twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from avtrain.config import Config, DataConfig, ModelConfig, ObjectivesConfig, TrainingConfig
from avtrain.data.loader import Batch
from avtrain.engine import Run
from avtrain.models import forms
from avtrain.models.cnn import Stage, stage3d
from avtrain.models.recomputation import kept, recomputed
from avtrain.pretraining.draw import Clips, drawn
from avtrain.pretraining.module import Pretraining, inputs_of
from avtrain.run_folder import RunFolder

SMALL = ModelConfig(visual_width=8, visual_blocks=(2, 1, 1), audio_width=8, audio_blocks=(2, 1), audio_stem_stride=2,
                    dimension=16, layers=2, heads=2, feedforward=32, rank=4, dropout=0.0, max_segments=5)
SEGMENTS = 3


class Noise(nn.Module):
    """Network and losses on noise, at the same start values whatever is recomputed."""

    def __init__(self, config: ModelConfig, clips: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.clips = clips
        objectives = ObjectivesConfig(negatives=6, mask_rate=0.4, sampling="random")
        self.network = Pretraining(Config(config, DataConfig(segments=SEGMENTS), objectives))

    def forward(self, step: int = 0) -> Tensor:
        """The loss of the step's batch; some segments and one clip's sound are absent."""
        generator = torch.Generator().manual_seed(step)
        visual = torch.randint(0, 256, (self.clips, SEGMENTS, 3, 8, 24, 24), dtype=torch.uint8, generator=generator)
        audio = torch.randn(self.clips, SEGMENTS, 1, 32, 32, generator=generator)
        seen = heard = torch.ones(self.clips, SEGMENTS, dtype=torch.bool)
        seen = seen.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(False))
        heard = heard.index_fill(0, torch.tensor(0), False)
        names = [str(clip) for clip in range(self.clips)]
        batch = Batch(visual[seen], audio[heard], seen, heard, [], names, list(range(self.clips)))
        draw = drawn(Clips(seen, heard, names), range(self.clips), 0, step, 0.4)
        loss: Tensor = self.network(*inputs_of(batch, self.clips, torch.device("cpu")), draw).loss
        return loss


def trained(config: ModelConfig, precision: torch.dtype | None, mode: bool = True) -> dict[str, Tensor]:
    """Loss, gradients and buffers of two steps; the second begins where the first led."""
    module, found = Noise(config).train(mode), {}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision is not None):
            loss = module(step)
        loss.backward()
        found[f"{step} loss"] = loss.detach()
        found |= {f"{step} gradient {name}": parameter.grad.clone() for name, parameter in module.named_parameters()
                  if parameter.grad is not None}
        optimizer.step()
    return found | dict(module.named_buffers())


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("visual", ["slow50", "slowfast50"])
@pytest.mark.parametrize("count", [1, 3])
def test_losses_gradients_and_averages_are_equal(visual: str, count: int, precision: torch.dtype | None) -> None:
    config = replace(SMALL, visual=visual)
    plain, again = (trained(replace(config, stages_recomputed=stages), precision) for stages in (0, count))
    assert plain.keys() == again.keys() and len(plain) > 200
    for name, tensor in plain.items():
        assert torch.equal(tensor, again[name]), name
    counts = [int(tensor) for name, tensor in again.items() if name.endswith("num_batches_tracked")]
    assert counts and set(counts) == {2}


def test_equal_in_evaluation_mode_too() -> None:
    plain, again = (trained(replace(SMALL, stages_recomputed=stages), None, mode=False) for stages in (0, 2))
    for name, tensor in plain.items():
        assert torch.equal(tensor, again[name]), name


def test_only_the_first_stages_run_again() -> None:
    module, calls = Noise(replace(SMALL, stages_recomputed=1)).train(), {}

    def count(block: nn.Module, _: Any) -> None:
        calls[block] = calls.get(block, 0) + 1

    stages = [stage for cnn in (module.network.model.visual_cnn, module.network.model.audio_cnn)
              for stage in cnn.stages]
    assert all(isinstance(stage, Stage) for stage in stages) and len(stages) == 5
    for stage in stages:
        stage[0].register_forward_pre_hook(count)
    with torch.no_grad():
        module()
    assert [calls.pop(stage[0]) for stage in stages] == [1, 1, 1, 1, 1]
    module().backward()
    assert [calls[stage[0]] for stage in stages] == [2, 1, 1, 2, 1]


@pytest.mark.seconds
@pytest.mark.slow
def test_256_equal_parts_have_the_gradient_of_one(tmp_path: Path) -> None:
    """Under autocast, as the engine accumulates. Summed in bfloat16, most of it would be lost."""
    found = []
    for parts in (1, 256):
        module = Noise(replace(SMALL, visual_blocks=(1,), audio_blocks=(1,), layers=1, stages_recomputed=1),
                             clips=2).train()
        optimizer = Watched(module.parameters(), fused=True)
        training = TrainingConfig(steps=1, clip_norm=0.0)
        run = Run(RunFolder(tmp_path / str(parts)), {"module": module}, optimizer, training, lambda folder: None)
        run.train(lambda batch, part, module=module, parts=parts: (module() / parts, {}), Equal(parts),
                  lambda: torch.autocast("cpu", torch.bfloat16), dict)
        found.append(optimizer.gradients)
    assert len(found[0]) > 80
    for one, many in zip(*found, strict=True):
        assert (many - one).norm() <= 0.01 * one.norm()


class Watched(torch.optim.SGD):
    """Keeps the gradients that it is to use."""

    def step(self, closure: Any = None) -> None:
        self.gradients = [parameter.grad.clone() for group in self.param_groups for parameter in group["params"]
                          if parameter.grad is not None]


class Equal:
    """A batch that is always the same."""

    batch_size = 256

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return 1

    def starting_at(self, first: int) -> Iterator[Any]:
        """From that batch on."""
        while True:
            yield SimpleNamespace(keys=["clip"])


class CountedNorm(torch.autograd.Function):
    """relu(batch_norm(x) + shortcut) from factors, which are scale, offset, mean and 1 / deviation."""

    @staticmethod
    def forward(context: Any, x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, factors: Tensor,
                of_all: Tensor | None, relu: bool, fork: bool) -> Tensor:
        scale, offset, *_ = factors.view(4, 1, -1, 1, 1, 1)
        y = x * scale + offset + (0 if shortcut is None else shortcut)
        context.relu, context.with_shortcut = relu, shortcut is not None
        y = y.relu() if relu else y
        context.save_for_backward(x, y, factors)
        return y

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, factors = context.saved_tensors
        gradient = gradient * (y > 0) if context.relu else gradient
        scale, _, mean, inverse = factors.view(4, 1, -1, 1, 1, 1)
        normal, over = (x - mean) * inverse, (0, 2, 3, 4)
        of_weight, of_bias = (gradient * normal).sum(over), gradient.sum(over)
        shared = (normal * of_weight.view_as(mean) + of_bias.view_as(mean)) / (x.numel() / len(of_bias))
        return (scale * (gradient - shared), gradient if context.with_shortcut else None, of_weight, of_bias, None,
                None, None, None)


@pytest.mark.parametrize("again", [False, True])
def test_what_norms_have_measured_is_taken_again(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With norms as on CUDA, or as over several processes, which must not be asked a second time."""
    torch.manual_seed(0)
    plain, stage = (stage3d(8, 4, 2, 3, 2, recomputed).double().train() for recomputed in (False, again))
    stage.load_state_dict(plain.state_dict())
    x, measured = torch.randn(3, 8, 4, 8, 8).double(), []

    def factors(x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float,
                eps: float) -> Tensor:
        measured.append(weight)
        variance, mean = torch.var_mean(x, (0, 2, 3, 4), correction=0)
        unbiased = variance * (x.numel() / len(mean)) / (x.numel() / len(mean) - 1)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(unbiased, momentum)
        inverse = (variance + eps).rsqrt()
        return torch.stack((weight * inverse, bias - mean * weight * inverse, mean, inverse))

    inputs = [x.clone().requires_grad_() for _ in range(2)]
    plain(inputs[0]).square().sum().backward()
    monkeypatch.setattr(forms.ACTIVE, "fork", False)
    monkeypatch.setattr(forms, "norm_is_fused", lambda x, norm: norm.training)
    monkeypatch.setattr(forms, "_norm_kernels", lambda: SimpleNamespace(
        factors=factors, FusedNorm=CountedNorm, laid_out=lambda x: x))
    stage(inputs[1]).square().sum().backward()
    assert len(measured) == sum(isinstance(module, _BatchNorm) for module in stage.modules()) == 7
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for (name, ours), theirs in zip(stage.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    for name, buffer in stage.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name), msg=name)


def test_a_measure_has_no_gradient_and_is_kept_for_its_own_run() -> None:
    """Two parts in flight at once: each second run gets what its own first run measured."""
    norm, measured = nn.BatchNorm1d(1), []

    def part(x: Tensor) -> Tensor:
        def measure() -> Tensor:
            measured.append(float(x.detach().mean()))
            return x.mean()

        mean = kept(norm, measure)
        assert not mean.requires_grad
        return (x * mean).exp()

    inputs = [torch.full((2,), value, requires_grad=True) for value in (1.0, 2.0)]
    torch.stack([recomputed(part, x) for x in inputs]).sum().backward()
    assert measured == [1.0, 2.0]
    for x in inputs:
        value = float(x.detach()[0])
        torch.testing.assert_close(x.grad, torch.full((2,), value).mul(value).exp() * value)
