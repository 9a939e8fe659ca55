"""A whole training step on the device, in a given setting: what `avtrain pretrain` does, each measure switchable."""

from __future__ import annotations

import copy
import gc
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from avtrain.config import Config
from avtrain.finite_steps import FiniteSteps
from avtrain.flops import training_flop
from avtrain.models import forms
from avtrain.models.avbert import AVBert
from avtrain.models.cnn import Residual, Stage
from avtrain.models.graphs import capture, own_gradients
from avtrain.pretraining.draw import Clips, Draw, drawn
from avtrain.pretraining.objectives import Objectives
from avtrain.pretraining.optimizer import pretraining_optimizer
from benchmarks.gpu.device import NOMINAL_TFLOPS, synchronize
from benchmarks.gpu.report import Figures

PLAIN = {"temporal": True, "spatial": False, "pointwise": "plain", "stem": False, "pool": False, "norm": False,
         "fork": False, "kernels": False}
ALL: dict[str, Any] = {}  # the defaults
Mark = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """How a step is computed.

    Attributes:
        clips: of a micro-batch.
        forms: of the visual CNN's operations, where they differ from the defaults.
        checkpointed: so many first stages of the CNNs are run again in the backward pass.
        channels_last: layout of the CNNs.
        search: cudnn.benchmark.
        fused_optimizer: AdamW in one kernel.
        waits: figures and checks are read by the host in every step, as the loop did at first; and which segments are
            present too.
        compiled: "" or "blocks" (of the CNNs), "stages", "transformers".
        graphed: "" or "cnns", "all" (Transformers too): CUDA graphs of them.
        deterministic: only deterministic kernels.
        precision: of autocast; None: float32.
    """

    clips: int = 8
    forms: dict[str, Any] = field(default_factory=dict)
    checkpointed: int = 0
    channels_last: bool = True
    search: bool = False
    fused_optimizer: bool = True
    waits: bool = False
    compiled: str = ""
    graphed: str = ""
    deterministic: bool = False
    precision: torch.dtype | None = torch.bfloat16


class Bench:
    """Start values and a batch, for any number of settings.

    Args:
        config: of the preset.
        device: where the steps run.
        most_clips: of a batch.
    """

    def __init__(self, config: Config, device: torch.device, most_clips: int) -> None:
        self.config, self.device, self.most_clips = config, device, most_clips
        torch.manual_seed(0)
        self._model, self._objectives = AVBert(config.model), Objectives(config.model, config.objectives)
        self.batch = random_batch(config, most_clips, device)
        self.tflop_per_clip = training_flop(config) / 1e12
        self.ceiling_tflops = math.nan  # measured in part 1
        self.best: Setting | None = None  # the fastest that was measured
        self._best_rate = 0.0

    def modules(self, setting: Setting) -> tuple[AVBert, Objectives]:
        """The network at its start values, in training mode."""
        model = AVBert(replace(self.config.model, stages_recomputed=setting.checkpointed))
        model.load_state_dict(self._model.state_dict())
        if not setting.channels_last:
            for cnn in (model.visual_cnn, model.audio_cnn):
                cnn.to(memory_format=torch.contiguous_format)
        objectives = copy.deepcopy(self._objectives)
        model, objectives = model.to(self.device).train(), objectives.to(self.device).train()
        if setting.compiled:
            torch._dynamo.config.cache_size_limit = 256
            kinds = {"blocks": Residual, "stages": Stage, "transformers": type(model.encoder.stacks[0][0])}  # type: ignore[index]
            for module in model.modules():
                if isinstance(module, kinds[setting.compiled]):
                    module.compile(dynamic=False)
        return model, objectives

    @contextmanager
    def running(self, setting: Setting) -> Iterator[Step]:
        """A step in that setting; the device's memory is free again afterwards."""
        before = torch.backends.cudnn.benchmark
        gc.collect()  # graphs hold their memory until they are gone, and stand in rings
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            with ExitStack() as stack:
                stack.enter_context(forms.using(**setting.forms))
                torch.backends.cudnn.benchmark = setting.search
                if setting.deterministic:
                    torch.use_deterministic_algorithms(True, warn_only=True)
                yield Step(self, setting)
        finally:
            torch.backends.cudnn.benchmark = before
            torch.use_deterministic_algorithms(False)
            torch._dynamo.reset()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def measure(self, setting: Setting, profiled: bool = False) -> Figures:
        """Milliseconds a step, clips/s, share of the peak, peak memory.

        Args:
            profiled: also the milliseconds that the device spends in kernels; the host is slower from then on.
        """
        with self.running(setting) as step:
            began = perf_counter()
            batch = tuple(tensor[:setting.clips] for tensor in self.batch)
            loss = step(batch)
            step(batch)
            synchronize(self.device)
            warm_up_s = perf_counter() - began
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            taken: list[float] = []
            while len(taken) < 3 or (sum(taken) < 1 and len(taken) < 30):
                began = perf_counter()
                step(batch)
                synchronize(self.device)
                taken.append(perf_counter() - began)
            busy = {"kernels_ms": kernels_ms(lambda: step(batch))} if profiled and self.device.type == "cuda" else {}
            figures = self.figures(setting.clips, statistics.median(taken))
            if figures["clips_per_s"] > self._best_rate:
                self.best, self._best_rate = setting, figures["clips_per_s"]
            return {"clips": setting.clips, **figures, **busy,
                    "peak_gib": self.peak_gib(), "warm_up_s": warm_up_s, "steps": len(taken),
                    "first_loss": float(loss)}

    def figures(self, clips: int, step_s: float) -> Figures:
        """A step's time in all its forms."""
        rate = clips / step_s
        return {"ms": 1000 * step_s, "clips_per_s": rate, "mfu_nominal": self.tflop_per_clip * rate / NOMINAL_TFLOPS,
                "mfu_measured": self.tflop_per_clip * rate / self.ceiling_tflops}

    def peak_gib(self) -> float:
        """Most memory that tensors took since the counter was set back."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else math.nan


class Step:
    """One optimiser step, called with (visual, audio, visual_present, audio_present) on the device -> the loss."""

    def __init__(self, bench: Bench, setting: Setting) -> None:
        self._bench, self._setting = bench, setting
        self.model, self.objectives = bench.modules(setting)
        training = bench.config.training
        self.optimizer = pretraining_optimizer(
            {"model": self.model, "objectives": self.objectives},
            replace(training, learning_rate=training.learning_rate * 0.01),
            fused=setting.fused_optimizer)
        self._parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self._finite = FiniteSteps([self.model, self.objectives], bench.device)
        self._number = 0
        if setting.graphed and bench.device.type == "cuda":
            visual, audio = (part[:setting.clips] for part in bench.batch[:2])
            capture(self.model, visual, audio, bench.config.objectives.draws, setting.precision,
                    setting.graphed == "all")
            own_gradients(self.model)
            own_gradients(self.objectives)
        torch.manual_seed(5)  # the same dropout in every setting, so that first losses can be compared

    def __call__(self, batch: tuple[Tensor, ...], mark: Mark = lambda name: None) -> Tensor:
        waits, clip = self._setting.waits, self._bench.config.training.clip_norm or math.inf
        with torch.autocast(self._bench.device.type, self._setting.precision,
                            enabled=self._setting.precision is not None):
            draw = draw_of_noise(self._bench.config, len(batch[0]), self._number, self._bench.device)
            *inputs, read = all_there(*batch)
            embedded = self.model.embed(*batch)[0] if waits else self.model.embed_segments(*inputs)
            mark("CNNs, forward")
            result = self.objectives(self.model, embedded, draw, read)
        mark("Transformers and objectives, forward")
        result.loss.backward()
        mark("backward")
        loss = result.loss.detach()
        if waits:
            _ = [float(value) for value in (loss, *result.parts.values())]
        norm = nn.utils.clip_grad_norm_(self._parameters, clip)
        bad = self._finite.after(loss, norm)
        if self._setting.fused_optimizer:
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bool(bad):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self._setting.graphed)
        self._number += 1
        mark("clipping and optimiser")
        return loss


def kernels_ms(function: Callable[[], object]) -> float:
    """Milliseconds that the device spends in kernels during a call."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        function()
        torch.cuda.synchronize()
    return sum(event.time_range.elapsed_us() for event in found.events()
               if event.device_type == torch.autograd.DeviceType.CUDA and not is_annotation(event)) / 1000


def is_annotation(event: Any) -> bool:
    """Ranges of the profiler's own, that lie over kernels."""
    return getattr(event, "is_user_annotation", False) or event.name.startswith(("Optimizer.", "ProfilerStep"))


def random_batch(config: Config, clips: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clips of noise, all their segments present, as `Batch.tensors` gives them."""
    data = config.data
    generator = torch.Generator(device).manual_seed(2)
    shape = (clips, data.segments, 3, data.segment_frames, data.crop, data.crop)
    visual = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    audio = torch.randn(clips, data.segments, 1, data.mels, data.mel_frames, device=device, generator=generator)
    present = torch.ones(clips, data.segments, dtype=torch.bool, device=device)
    return visual, audio, present, present.clone()


def all_there(visual: Tensor, audio: Tensor, visual_present: Tensor, audio_present: Tensor) -> tuple[Any, ...]:
    """Such clips as `Pretraining.forward` takes them, all but the draw."""
    return (visual.flatten(0, 1), audio.flatten(0, 1), visual_present, audio_present, (None, None),
            visual_present[:, 0])


def draw_of_noise(config: Config, clips: int, step: int, device: torch.device) -> Draw:
    """Masks and pairs for such a batch."""
    present = torch.ones(clips, config.data.segments, dtype=torch.bool)
    objectives = config.objectives
    named = Clips(present, present, [str(clip) for clip in range(clips)])
    return drawn(named, range(clips), config.training.seed, step, objectives.mask_rate, objectives.draws).to(device)
