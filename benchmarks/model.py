"""The model's speed and memory: ratios of runs in one process, and the peak of one in a process of its own."""

from __future__ import annotations

import resource
import subprocess
import sys

import torch

from avtrain.config import ModelConfig, read_config
from avtrain.models.avbert import AVBert
from avtrain.models.lowrank import LowRankLinear, rotation_of
from avtrain.models.transformer import Encoder
from benchmarks import Row, interleaved_medians, share_of, times_faster
from benchmarks.plain_encoder import plain_transformer

MEMORY_GIB = 10.0


def run() -> list[Row]:
    """All rows of this module."""
    return [*encoder_rows(), whole_model_row(), memory_row()]


def encoder_rows() -> list[Row]:
    """Forward and backward of the three Transformers on 4 clips of 15 segments, float32, no dropout in either."""
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(dropout=0.0), transformers=3)
    skews = torch.cat([module.skew.detach().flatten(0, 1) for module in encoder.modules()
                       if isinstance(module, LowRankLinear)]).requires_grad_()
    hidden = [torch.randn(4, length, 768) for length in (16, 16, 32)]
    target = [torch.randn_like(x) for x in hidden]

    def ours() -> None:
        folded = encoder.fold()
        losses = [(encoder(x, torch.ones(x.shape[:2], dtype=torch.bool), number, folded) * target[number]).sum()
                  for number, x in enumerate(hidden)]
        torch.stack(losses).sum().backward()

    def plain() -> None:
        losses = [(plain_transformer(encoder, x, number) * target[number]).sum() for number, x in enumerate(hidden)]
        torch.stack(losses).sum().backward()

    def rotations() -> None:
        rotation = rotation_of(skews)
        rotation.backward(torch.ones_like(rotation))

    seconds, plain_seconds, rotation_seconds = interleaved_medians(7, ours, plain, rotations)
    return [times_faster("encoder, against the plain formulas", seconds, plain_seconds, 2.5),
            share_of("18 rotations, as a share of the encoder", "s", rotation_seconds, seconds, 0.25)]


def whole_model_row() -> Row:
    """Forward and backward of one clip of 2 segments, with no gradient left over from before, as in training."""
    torch.manual_seed(0)
    model, contiguous = AVBert(ModelConfig()), AVBert(ModelConfig())
    for cnn in (contiguous.visual_cnn, contiguous.audio_cnn):
        cnn.to(memory_format=torch.contiguous_format)
    visual, audio = torch.randn(1, 2, 3, 32, 112, 112), torch.randn(1, 2, 1, 80, 128)

    def step(which: AVBert, bfloat16: bool) -> None:
        which.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            output = which(visual, audio)
        output.multimodal_tokens.float().square().mean().backward()

    ours, baseline = interleaved_medians(9, lambda: step(model, True), lambda: step(contiguous, False))
    return times_faster("model, bfloat16 + channels-last, against float32", ours, baseline, 2.0)


def memory_row() -> Row:
    """Peak memory of one optimiser step of the paper preset on 2 clips, float32, two stages run again; on its own."""
    command = [sys.executable, "-c", "from benchmarks.model import paper_step; paper_step()"]
    peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return share_of("paper preset, batch 2: peak memory", "GiB", peak, MEMORY_GIB, 1.0)


def paper_step() -> None:
    """One step of the paper preset; prints this process's peak memory in GiB."""
    config = read_config("paper", ["model.stages_recomputed=2"])
    data = config.data
    model = AVBert(config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, amsgrad=True)
    visual = torch.randint(0, 256, (2, data.segments, 3, data.segment_frames, data.crop, data.crop), dtype=torch.uint8)
    audio = torch.randn(2, data.segments, 1, data.mels, data.mel_frames)
    output = model(visual, audio)
    output.multimodal_tokens.square().mean().backward()
    optimizer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    print(peak / (2**30 if sys.platform == "darwin" else 2**20))
