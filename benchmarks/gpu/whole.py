"""Part 2: outputs, loss and gradients of the whole network: the device against the CPU, bfloat16 against float32."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from avtrain.config import Config
from avtrain.models import forms
from avtrain.models.avbert import AVBert
from avtrain.models.graphs import capture
from avtrain.pretraining.draw import Clips, drawn
from avtrain.pretraining.objectives import Objectives
from benchmarks.gpu.report import Figures, Report
from benchmarks.gpu.steps import PLAIN

FLOAT32, OF_CPU, OF_PLAIN, LOSS = 1e-4, 1.5, 1.1, 0.01
Found = dict[str, Tensor]


def half_precision(report: Report, config: Config, device: torch.device) -> None:
    """bfloat16 against float32, both on the device, with as many segments as a process of the paper's had, 60.

    Plain operations show what bfloat16 costs; our forms, and graphs of them, may cost 1.1 times that. The loss is one
    number, whose error may be small by luck alone: its bar is 1 %.
    """
    whole = Whole(config, 4, config.data.segments, evaluate=False)
    kept: dict[str, Any] = {}

    def reference() -> Figures:
        kept["exact"] = whole.found(device, torch.float32, False, PLAIN)
        return {"segments": whole.segments, "loss": float(kept["exact"]["loss"])}

    def against(form: dict[str, Any], graphs: bool, plain: bool, recomputed: int = 0) -> Figures:
        errors = compared(whole.found(device, torch.float32, True, form, graphs, recomputed), kept["exact"])
        if plain:
            kept["plain"] = errors
        limits = {name: OF_PLAIN * kept["plain"][name] for name in ("outputs", "gradients")} | {"loss": LOSS}
        return {**errors, "ok": all(errors[name] <= limit for name, limit in limits.items())}

    report.measure("reference: device, float32, plain, training", reference)
    report.measure("bfloat16, plain forms", lambda: against(PLAIN, False, True))
    report.measure("bfloat16, all forms", lambda: against({}, False, False))
    report.measure("bfloat16, all forms, two stages run again", lambda: against({}, False, False, 2))
    if device.type == "cuda":
        report.measure("bfloat16, all forms, graphs", lambda: against({}, True, False))


def single_precision(report: Report, config: Config, device: torch.device) -> None:
    """The device's float32 against the CPU's float64, beside what the CPU's float32 makes of it.

    Few segments make BatchNorm ill-conditioned in training: rounding shows a thousandfold in gradients, on CPUs as on
    GPUs. So the bar is 1.5 times the error of the CPU's float32. In evaluation, outputs and loss are within 1e-4; a
    gradient changes by jumps where rounding decides a ReLU's sign, so there its bar is the larger of the two.
    """
    on_cpu = torch.device("cpu")
    for case, whole in (("evaluation", Whole(config, 2, min(3, config.data.segments), evaluate=True)),
                        ("training", Whole(config, 2, min(6, config.data.segments), evaluate=False))):
        kept: dict[str, Any] = {}

        def reference(whole: Whole = whole, kept: dict[str, Any] = kept) -> Figures:
            kept["exact"] = whole.found(on_cpu, torch.float64, False, PLAIN)
            return {"segments": whole.segments, "loss": float(kept["exact"]["loss"])}

        def own(whole: Whole = whole, kept: dict[str, Any] = kept) -> Figures:
            kept["own"] = compared(whole.found(on_cpu, torch.float32, False, PLAIN), kept["exact"])
            return dict(kept["own"])

        def against(form: dict[str, Any], whole: Whole = whole, kept: dict[str, Any] = kept,
                    case: str = case) -> Figures:
            errors = compared(whole.found(device, torch.float32, False, form), kept["exact"])
            bars = {name: OF_CPU * kept["own"][name] for name in ("outputs", "gradients")} | {"loss": FLOAT32}
            if case == "evaluation":
                bars |= {"outputs": FLOAT32, "gradients": max(FLOAT32, bars["gradients"])}
            return {**errors, "ok": all(errors[name] <= bar for name, bar in bars.items())}

        report.measure(f"reference: CPU, float64, {case}", reference, 5)
        report.measure(f"CPU, float32, {case}", own, 3)
        for label, form in (("all", {}), ("plain", PLAIN)):
            report.measure(f"device, float32, {label} forms, {case}", lambda form=form, against=against: against(form))


class Whole:
    """Outputs, loss and gradients of a batch of noise.

    Without dropout; negatives are drawn alike for all, not by distance, whose order rounding may change.

    Args:
        config: of the preset.
        clips, segments: of the batch; segments of a clip.
        evaluate: BatchNorm uses running statistics, which are those of the batch in float32.
    """

    def __init__(self, config: Config, clips: int, segments: int, evaluate: bool) -> None:
        config = replace(config, model=replace(config.model, dropout=0.0),
                         objectives=replace(config.objectives, sampling="random", draws=1))
        data, self._evaluate, self.segments = config.data, evaluate, clips * segments
        torch.manual_seed(3)
        self._model, self._objectives = AVBert(config.model), Objectives(config.model, config.objectives)
        self._pixels = torch.randint(0, 256, (clips, segments, 3, data.segment_frames, data.crop, data.crop),
                                     dtype=torch.uint8)
        self._audio = torch.randn(clips, segments, 1, data.mels, data.mel_frames)
        if evaluate:
            self._settle()

    @torch.no_grad()
    def _settle(self) -> None:
        norms = [module for module in self._model.modules() if isinstance(module, _BatchNorm)]
        momentum = norms[0].momentum
        for norm in norms:
            norm.momentum = 1.0
        self._model.train().embed(self._pixels, self._audio)
        for norm in norms:
            norm.momentum = momentum

    def found(self, device: torch.device, dtype: torch.dtype, autocast: bool, form: dict[str, Any],
              graphs: bool = False, recomputed: int = 0) -> Found:
        """All of it in float64 on the CPU, by name: loss, output.*, gradient.*."""
        again = AVBert(replace(self._model.config, stages_recomputed=recomputed))
        again.load_state_dict(self._model.state_dict())
        model, objectives = (module.to(device, dtype).train(not self._evaluate)
                             for module in (again, copy.deepcopy(self._objectives)))
        assert isinstance(model, AVBert) and isinstance(objectives, Objectives)
        visual, audio = self._pixels.to(device), self._audio.to(device, dtype)
        if dtype == torch.float64:
            visual = (visual.double() / 255 - 0.45) / 0.225
        with forms.using(**form):
            if graphs:
                capture(model, visual, audio, 1, torch.bfloat16, True)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                embedded, *_ = model.embed(visual, audio)
                present, clips = torch.ones(visual.shape[:2], dtype=torch.bool), range(len(visual))
                draw = drawn(Clips(present, present, [str(clip) for clip in clips]), clips, 0, 4,
                             objectives.config.mask_rate).to(device)
                result = objectives(model, embedded, draw, present[:, 0].to(device))
            result.loss.backward()
        found = {"loss": result.loss, "output.visual": embedded.visual_local, "output.audio": embedded.audio_local}
        named: list[nn.Module] = [model, objectives]
        for module in named:
            found |= {f"gradient.{name}": parameter.grad for name, parameter in module.named_parameters()
                      if parameter.grad is not None}
        return {name: value.detach().double().cpu() for name, value in found.items()}


def compared(found: Found, reference: Found) -> Figures:
    """Relative errors: of the worst output, the loss, all gradients as one vector; and the worst parameter's."""
    errors = {name: relative(value, reference[name]) for name, value in found.items() if name in reference}
    outputs = max(error for name, error in errors.items() if name.startswith("output"))
    gradients = relative(*(torch.cat([values[name].flatten() for name in reference if name.startswith("gradient")])
                           for values in (found, reference)))
    worst = max((name for name in errors if name.startswith("gradient")), key=lambda name: errors[name])
    return {"outputs": outputs, "loss": errors["loss"], "gradients": gradients, "worst": {worst: errors[worst]}}


def relative(value: Tensor, reference: Tensor) -> float:
    """The error's norm in parts of the reference's."""
    value, reference = value.detach(), reference.detach()
    return float((value - reference).norm() / reference.norm().clamp(min=1e-30))
