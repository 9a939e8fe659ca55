"""How much of a GPU's arithmetic a run uses (MFU): operations are counted from the model, peaks are data sheets'."""

from __future__ import annotations

from dataclasses import replace

import torch

from avtrain.config import Config
from avtrain.models.avbert import AVBert

_COUNTED = 2  # segments
# Dense bfloat16 with float32 sums, TFLOP/s, by what the driver's name of the card holds; the longest that fits counts.
_PEAKS_TFLOPS = {"A100": 312.0, "A10": 125.0, "B200": 2250.0, "GH200": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0,
                 "H100": 989.0, "H200": 989.0, "L4": 121.0, "L40S": 362.0, "RTX 3090": 71.0, "RTX 4090": 165.0}


def peak_tflops(name: str) -> float | None:
    """Of a card, by the name that `torch.cuda.get_device_name` gives; None where it is not known.

    Only whole words count: an A1000 is no A100.
    """
    words = f" {name.replace('-', ' ')} "
    known = [card for card in _PEAKS_TFLOPS if f" {card} " in words]
    return _PEAKS_TFLOPS[max(known, key=len)] if known else None


def peak_of(device: torch.device, precision: torch.dtype | None) -> float | None:
    """TFLOP/s of a device in that precision; None where it is not known, or not bfloat16."""
    if device.type != "cuda" or precision != torch.bfloat16:
        return None
    return peak_tflops(torch.cuda.get_device_name(device))


def mfu_of_clip_per_s(config: Config, device: torch.device, precision: torch.dtype | None) -> float | None:
    """The share of a device's peak that one clip a second takes; None where that is not known."""
    peak = peak_of(device, precision)
    return None if peak is None else training_flop(config) / (peak * 1e12)


def training_flop(config: Config) -> float:
    """Floating-point operations of a clip's forward and backward pass, all segments present, nothing recomputed."""
    from torch.utils.flop_counter import FlopCounterMode  # wants Triton's own types, which docs are built without

    data = config.data
    with torch.device("meta"):  # shapes are enough
        model = AVBert(replace(config.model, stages_recomputed=0))
        with FlopCounterMode(display=False) as counter:
            embedded = model.embed(torch.randn(1, _COUNTED, 3, data.segment_frames, data.crop, data.crop),
                                   torch.randn(1, _COUNTED, 1, data.mels, data.mel_frames))[0]
            (embedded.visual_local.sum() + embedded.audio_local.sum()).backward()
        local, present = torch.randn(1, data.segments, config.model.dimension), torch.ones(1, data.segments).bool()
        with FlopCounterMode(display=False) as of_transformers:
            model.eval().contextualize(local.requires_grad_(), local, present, present)
    of_cnns = float(counter.get_total_flops()) / _COUNTED
    return data.segments * of_cnns + 3.0 * float(of_transformers.get_total_flops())
