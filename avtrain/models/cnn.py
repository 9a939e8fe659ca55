"""The local embeddings' networks: a 3-D ResNet or SlowFast for pictures, a 2-D ResNet for log-mel spectrograms.

Sizes are given by `width` (channels of the stem) and `blocks` (bottlenecks of each stage); the published networks are
width 64 and 32 with blocks (3, 4, 6, 3). All take a batch of segments and return one pooled vector a segment.
Weights, and with them all maps, lie channels-last, which is faster in float32 and twice so in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avtrain.models import forms
from avtrain.models.recomputation import normed, recomputed
from avtrain.models.synced_norm import is_over_ranks, normed_over_ranks
from avtrain.runtime import without_autocast

EXPANSION = 4  # a bottleneck's outputs per inner channel


class VisualCNN(nn.Module):
    """`slow50`: a 3-D ResNet with temporal kernels in the stem and in its later stages.

    Args:
        width: channels of the stem.
        blocks: bottlenecks a stage; stages after the first halve height and width.
        recomputed: so many first stages keep no maps for the backward pass: they run again in it.
    """

    def __init__(self, width: int, blocks: Sequence[int], recomputed: int = 0) -> None:
        super().__init__()
        self.outputs = width * EXPANSION * 2 ** (len(blocks) - 1)
        self.stem = Chain(*conv3d(3, width, (5, 7, 7), (2, 2, 2)), nn.ReLU(inplace=True), Pool3d())
        self.stages = nn.ModuleList()
        inputs = width
        for index, count in enumerate(blocks):
            inner, temporal, stride = width * 2 ** index, 1 if index < 2 else 3, 1 if index == 0 else 2
            self.stages.append(stage3d(inputs, inner, count, temporal, stride, index < recomputed))
            inputs = inner * EXPANSION
        channels_last(self)

    def forward(self, segments: Tensor) -> Tensor:
        """(segments, 3, frames, height, width), uint8 or normalised floats -> (segments, outputs)."""
        weight = self.stem[0].weight
        assert isinstance(weight, Tensor)
        if forms.ACTIVE.stem and segments.is_cuda and segments.shape[3] % 2 == segments.shape[4] % 2 == 0:
            x = self.stem(forms.stem_convolution(segments, weight), first=1)
        else:
            # (segments, width, frames / 2, height / 4, width / 4)
            x = self.stem(forms.normalized(segments).to(weight.dtype))
        for stage in self.stages:
            x = stage(x)
        pooled: Tensor = x.mean((2, 3, 4))
        return pooled


class SlowFastCNN(nn.Module):
    """`slowfast50`: SlowFast networks (Feichtenhofer et al., ICCV 2019, table 1), ResNet-50, alpha 8, beta 1/8.

    The fast pathway sees every frame with an eighth of the channels, the slow one every eighth frame; after the stem
    and after every stage but the last, a time-strided convolution brings the fast pathway's maps to the slow one.
    At the published size, 2048 + 256 = 2304 features.

    Args:
        width: channels of the slow stem, a multiple of 8.
        blocks: bottlenecks a stage, in both pathways.
        recomputed: as in `VisualCNN`.
    """

    ALPHA = 8  # frames of the fast pathway per frame of the slow one
    BETA = 8   # channels of the slow pathway per channel of the fast one

    def __init__(self, width: int, blocks: Sequence[int], recomputed: int = 0) -> None:
        super().__init__()
        fast_width = width // self.BETA
        self.outputs = (width + fast_width) * EXPANSION * 2 ** (len(blocks) - 1)
        self.slow_stem = Chain(*conv3d(3, width, (1, 7, 7), (1, 2, 2)), nn.ReLU(inplace=True), Pool3d())
        self.fast_stem = Chain(*conv3d(3, fast_width, (5, 7, 7), (1, 2, 2)), nn.ReLU(inplace=True), Pool3d())
        self.laterals, self.slow_stages, self.fast_stages = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        slow, fast = width, fast_width
        for index, count in enumerate(blocks):
            lateral = 2 * fast
            self.laterals.append(Chain(*conv3d(fast, lateral, (5, 1, 1), (self.ALPHA, 1, 1)), nn.ReLU(inplace=True)))
            stride, temporal, again = 1 if index == 0 else 2, 1 if index < 2 else 3, index < recomputed
            self.slow_stages.append(stage3d(slow + lateral, width * 2 ** index, count, temporal, stride, again))
            self.fast_stages.append(stage3d(fast, fast_width * 2 ** index, count, 3, stride, again))
            slow, fast = width * 2 ** index * EXPANSION, fast_width * 2 ** index * EXPANSION
        channels_last(self)

    def forward(self, segments: Tensor) -> Tensor:
        """(segments, 3, frames, height, width), uint8 or normalised floats -> (segments, outputs)."""
        weight = self.fast_stem[0].weight
        assert isinstance(weight, Tensor)
        pixels = forms.normalized(segments).to(weight.dtype)
        slow, fast = self.slow_stem(pixels[:, :, ::self.ALPHA]), self.fast_stem(pixels)
        for lateral, slow_stage, fast_stage in zip(self.laterals, self.slow_stages, self.fast_stages, strict=True):
            slow = slow_stage(torch.cat((slow, lateral(fast)), 1))
            fast = fast_stage(fast)
        return torch.cat((slow.mean((2, 3, 4)), fast.mean((2, 3, 4))), 1)


class AudioCNN(nn.Module):
    """`resnet50` on log-mel spectrograms; stem and first two stages treat frequency and time in turn.

    Args:
        width: channels of the stem.
        blocks: bottlenecks a stage; every stage halves frequency and time.
        stem_stride: of the stem, in both directions; 1 as published.
        mean, std: of log-mels, which are brought to 0 and 1. As published, 0 and 1 do nothing; but then the zeros
            around a map are far louder than what is in it.
        recomputed: as in `VisualCNN`.
    """

    def __init__(self, width: int, blocks: Sequence[int], stem_stride: int, mean: float = 0.0,
                 std: float = 1.0, recomputed: int = 0) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.outputs = width * EXPANSION * 2 ** (len(blocks) - 1)
        self.stem = Chain(
            *conv2d(1, width, (9, 1), (stem_stride, 1)), nn.ReLU(inplace=True),
            *conv2d(width, width, (1, 9), (1, stem_stride)), nn.ReLU(inplace=True))
        self.stages = nn.ModuleList()
        inputs = width
        for index, count in enumerate(blocks):
            inner = width * 2 ** index
            self.stages.append(stage2d(inputs, inner, count, split=index < 2, recomputed=index < recomputed))
            inputs = inner * EXPANSION
        # On CPUs, the backward pass of a channels-last 1 x 1 convolution of stride 2 writes outside its memory where
        # channels are not a multiple of 8 (oneDNN, torch 2.13).
        if width % 8 == 0:
            channels_last(self)

    def forward(self, segments: Tensor) -> Tensor:
        """(segments, 1, mels, frames) -> (segments, outputs)."""
        second = self.stem[3].weight
        assert isinstance(second, Tensor)
        x = (segments.to(second.dtype) - self.mean) / self.std
        if second.stride(1) == 1:
            # One channel lies in memory alike in both layouts. Unless its strides say channels-last, the first
            # convolution's outputs are not, and two slow conversions follow, a third of the network's time.
            x = x.squeeze(1).unsqueeze(-1).movedim(-1, 1)
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        pooled: Tensor = x.mean((2, 3))
        return pooled


class Chain(nn.Sequential):
    """Modules one after the other; on CUDA, BatchNorm, shortcut and ReLU are one operation."""

    def forward(self, x: Tensor, first: int = 0, shortcut: Tensor | None = None, fork: bool = False) -> Any:
        """The modules from `first` on; with a shortcut, relu(what they give + shortcut), twice if `fork`."""
        modules = list(self)[first:]
        while modules:
            module = modules.pop(0)
            if not isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
                x = module(x)
            elif not forms.norm_is_fused(x, module):
                x = normed_over_ranks(x, module) if is_over_ranks(module) else normed(x, module)
            elif modules:
                relu = isinstance(modules[0], nn.ReLU)
                modules = modules[int(relu):]
                x = forms.fused_norm(x, module, None, relu)
            else:
                return forms.fused_norm(x, module, shortcut, relu=shortcut is not None, fork=fork)
        x = x if shortcut is None else F.relu(x + shortcut, inplace=True)
        return (x, x) if fork else x


class Residual(nn.Module):
    """relu(branch(x) + shortcut(x))."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor, again: Tensor | None = None, fork: bool = False) -> Any:
        """Same rank in and out; channels and strides as the two parts have them.

        Args:
            again: `x` once more, for the shortcut, where it was returned twice.
            fork: whether to return the result twice.
        """
        return self.branch(x, shortcut=self.shortcut(x if again is None else again), fork=fork)


class Stage(nn.Sequential):
    """Bottlenecks one after the other; maps are handed on twice, see `forms.Forms.fork`.

    Args:
        blocks: the bottlenecks.
        recomputed: whether their maps are computed again in the backward pass, and not kept for it.
    """

    def __init__(self, *blocks: Residual, recomputed: bool = False) -> None:
        super().__init__(*blocks)
        self.recomputed = recomputed

    def forward(self, x: Tensor) -> Tensor:
        """Same rank in and out."""
        return recomputed(self._through, x) if self.recomputed else self._through(x)

    def _through(self, x: Tensor) -> Tensor:
        again: Tensor | None = None
        *blocks, last = self
        for block in blocks:
            x, again = block(x, again, fork=True)
        y: Tensor = last(x, again)
        return y


class Conv2d(nn.Conv2d):
    """A Conv2d that is right at every size: see `fits`."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width), as nn.Conv2d; float32 also under autocast where `fits` is false."""
        if x.device.type == "cpu" and self.kernel_size == (1, 1) != self.stride and self.in_channels < 16:
            # The same function. oneDNN's own stride writes where it must not in the backward pass, on several threads.
            return F.conv2d(x[..., ::self.stride[0], ::self.stride[1]], self.weight, self.bias)
        if fits(x, self.kernel_size):
            return super().forward(x)
        with without_autocast(x):
            return super().forward(x.to(self.weight.dtype))


class Conv3d(nn.Conv3d):
    """A Conv3d that is right at every size: see `fits`.

    One that is purely temporal runs as a 2-D convolution over frames and pixels, which oneDNN does faster; on CUDA,
    others have such forms too.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, frames, height, width), as nn.Conv3d; float32 also under autocast where `fits` is false."""
        if fits(x, self.kernel_size):
            if x.is_cuda:
                padding = tuple(int(size) for size in self.padding)
                return forms.convolution(x, self.weight, self.stride, padding)
            if self.kernel_size[0] > 1 and self.kernel_size[1:] == self.stride[1:] == (1, 1):
                flat = F.conv2d(x.flatten(3), self.weight.flatten(3), stride=(self.stride[0], 1),
                                padding=(int(self.padding[0]), 0))
                return flat.view(*flat.shape[:3], *x.shape[3:])
            return super().forward(x)
        with without_autocast(x):
            return super().forward(x.to(self.weight.dtype))


def fits(x: Tensor, kernel: Sequence[int]) -> bool:
    """Whether maps are at least as large as the kernel in every direction.

    Where they are smaller, the bfloat16 weight gradient of CPUs (oneDNN, avx512_bf16) is garbage for some kernels and
    strides, and may write outside its memory: (3, 1, 1) on 2 frames, a (5, 7, 7) stem on 4 frames, 3 x 3 with stride 2
    on 1 x 1. Such maps are small, so float32 costs next to nothing.
    """
    return all(size >= extent for size, extent in zip(x.shape[2:], kernel, strict=True))


def conv3d(inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int] = (1, 1, 1),
           ) -> list[nn.Module]:
    """Convolution with "same" padding and He's start values, and BatchNorm."""
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    convolution = Conv3d(inputs, outputs, kernel, stride, padding, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return [convolution, nn.BatchNorm3d(outputs)]


def conv2d(inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)) -> list[nn.Module]:
    """Convolution with "same" padding and He's start values, and BatchNorm."""
    convolution = Conv2d(inputs, outputs, kernel, stride, (kernel[0] // 2, kernel[1] // 2), bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return [convolution, nn.BatchNorm2d(outputs)]


class Pool3d(nn.MaxPool3d):
    """Halves height and width after a visual stem."""

    def __init__(self) -> None:
        super().__init__((1, 3, 3), (1, 2, 2), (0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, frames, height, width), as nn.MaxPool3d."""
        return forms.pool(x) if x.is_cuda and forms.ACTIVE.pool else super().forward(x)


def stage3d(inputs: int, inner: int, count: int, temporal: int, stride: int,
            recomputed: bool = False) -> Stage:
    """`count` bottlenecks: temporal x 1 x 1, then 1 x 3 x 3 with the spatial stride, then 1 x 1 x 1."""
    outputs = inner * EXPANSION
    blocks = []
    for index in range(count):
        steps = (1, stride, stride) if index == 0 else (1, 1, 1)
        branch = Chain(
            *conv3d(inputs, inner, (temporal, 1, 1)), nn.ReLU(inplace=True),
            *conv3d(inner, inner, (1, 3, 3), steps), nn.ReLU(inplace=True),
            *conv3d(inner, outputs, (1, 1, 1)))
        shortcut = Chain(*conv3d(inputs, outputs, (1, 1, 1), steps)) if index == 0 else nn.Identity()
        blocks.append(Residual(branch, shortcut))
        inputs = outputs
    return Stage(*blocks, recomputed=recomputed)


def stage2d(inputs: int, inner: int, count: int, split: bool, recomputed: bool = False) -> Stage:
    """`count` bottlenecks, the first of stride 2; `split`: the 3 x 3 convolution as 3 x 1 and 1 x 3."""
    outputs = inner * EXPANSION
    blocks = []
    for index in range(count):
        step = 2 if index == 0 else 1
        if split:
            middle = [*conv2d(inner, inner, (3, 1), (step, 1)), nn.ReLU(inplace=True),
                      *conv2d(inner, inner, (1, 3), (1, step))]
        else:
            middle = conv2d(inner, inner, (3, 3), (step, step))
        branch = Chain(
            *conv2d(inputs, inner, (1, 1)), nn.ReLU(inplace=True),
            *middle, nn.ReLU(inplace=True),
            *conv2d(inner, outputs, (1, 1)))
        shortcut = Chain(*conv2d(inputs, outputs, (1, 1), (step, step))) if index == 0 else nn.Identity()
        blocks.append(Residual(branch, shortcut))
        inputs = outputs
    return Stage(*blocks, recomputed=recomputed)


def channels_last(module: nn.Module) -> None:
    """Lay out the convolutions' weights channels-last; their outputs then follow."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.dim() in layouts:
            parameter.data = parameter.data.contiguous(memory_format=layouts[parameter.dim()])
