"""The whole model: fusion, absent segments and modalities, bfloat16, activation checkpointing, compilation."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from avtrain.config import ModelConfig, read_config
from avtrain.models.avbert import AVBert, AVBertOutput
from avtrain.models.cnn import Conv2d, Conv3d
from avtrain.models.transformer import attention

SEGMENTS = 3


def small(**changes: object) -> AVBert:
    torch.manual_seed(0)
    settings = {"visual_width": 8, "visual_blocks": (1, 1, 1), "audio_width": 4, "audio_blocks": (1, 1, 1),
                "audio_stem_stride": 2, "dimension": 16, "layers": 2, "heads": 2, "feedforward": 32, "rank": 4,
                "max_segments": 5, **changes}
    model = AVBert(ModelConfig(**settings))  # type: ignore[arg-type]
    for module in model.modules():  # running statistics that matter in eval mode
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
    return model


def clips(batch: int, segments: int = SEGMENTS, frames: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, segments, 3, frames, 24, 24), torch.randn(batch, segments, 1, 32, 32)


def fields(output: AVBertOutput) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in output._asdict().items() if tensor is not None}


def mask(*rows: str) -> Tensor:
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


@pytest.mark.parametrize(("fusion", "absent"), [("mid", set()), ("early", {"visual_tokens", "audio_tokens"}),
                                                ("late", {"multimodal_tokens"})])
@pytest.mark.parametrize("visual", ["slow50", "slowfast50"])
def test_shapes(fusion: str, absent: set[str], visual: str) -> None:
    model = small(fusion=fusion, visual=visual)
    output = fields(model(*clips(2)))
    pooled = 8 * 4 * 4 + (4 * 4 if visual == "slowfast50" else 0)
    shapes = {"visual_pooled": (2, 3, pooled), "audio_pooled": (2, 3, 64), "visual_local": (2, 3, 16),
              "audio_local": (2, 3, 16), "visual_tokens": (2, 4, 16), "audio_tokens": (2, 4, 16),
              "multimodal_tokens": (2, 8, 16)}
    assert {name: tuple(tensor.shape) for name, tensor in output.items()} == {
        name: shape for name, shape in shapes.items() if name not in absent}


@pytest.mark.parametrize("fusion", ["early", "mid", "late"])
@pytest.mark.parametrize("sharing", [(False, False, None), (True, True, None), (True, True, 4), (False, False, 4)])
def test_a_clip_depends_on_nothing_but_itself(fusion: str, sharing: tuple[bool, bool, int | None]) -> None:
    """Each clip alone, without padding, and without the modality that it lacks, gives what it gives in a batch."""
    layers, transformers, rank = sharing
    model = small(fusion=fusion, share_layers=layers, share_transformers=transformers, rank=rank).eval()
    visual, audio = clips(5)
    visual_present = mask("xxx", "xx.", "...", "x.x", "...")
    audio_present = mask("xxx", "xx.", "xxx", "...", "...")
    together = fields(model(visual, audio, visual_present, audio_present))
    disturbed = fields(model(visual.masked_fill(~visual_present[..., None, None, None, None], torch.nan),
                             audio.masked_fill(~audio_present[..., None, None, None], torch.nan),
                             visual_present, audio_present))
    for name, tensor in together.items():
        assert torch.equal(tensor, disturbed[name]), name

    def close(name: str, ours: Tensor, alone: Tensor) -> None:
        torch.testing.assert_close(ours, alone, rtol=0, atol=1e-5, msg=name)

    whole = fields(model(visual[:1], audio[:1]))
    short = fields(model(visual[1:2, :2], audio[1:2, :2]))
    silent = fields(model(visual[3:4], None, visual_present[3:4]))
    blind = fields(model(None, audio[2:3]))
    for name, tensor in together.items():
        close(name, tensor[:1], whole[name])
        close(name, tensor[2:3], blind[name])
        close(name, tensor[3:4], silent[name])
        kept = [0, 1, 2, 4, 5, 6] if name == "multimodal_tokens" else [0, 1, 2] if "tokens" in name else [0, 1]
        close(name, tensor[1:2, kept], short[name])
        dropped = [index for index in range(tensor.shape[1]) if index not in kept]
        assert torch.count_nonzero(tensor[1, dropped]) == 0
        assert torch.count_nonzero(tensor[4]) == 0
        if name.startswith("visual"):
            assert torch.count_nonzero(tensor[2]) == 0


@pytest.mark.parametrize("fusion", ["early", "mid", "late"])
def test_gradients_are_finite_whatever_is_absent(fusion: str) -> None:
    model = small(fusion=fusion, dropout=0.1).train()
    visual, audio = clips(4)
    output = fields(model(visual, audio, mask("xxx", "...", "x..", "..."), mask("...", "xx.", "x..", "...")))
    sum((tensor ** 3).sum() for tensor in output.values()).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 50
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_absent_segments_stay_out_of_the_statistics() -> None:
    masked, alone = small().train(), small().train()
    visual, audio = clips(2)
    masked(visual, audio, mask("x.x", "..."), mask("xxx", "x.."))
    alone(visual[:1, [0, 2]], None)
    alone(None, torch.cat((audio[0], audio[1, :1]))[None])
    for name, tensor in masked.state_dict().items():
        torch.testing.assert_close(tensor, alone.state_dict()[name], msg=name)


def test_nothing_at_all_is_refused() -> None:
    visual, audio = clips(2)
    with pytest.raises(ValueError, match="visual or audio"):
        small()(None, None)
    with pytest.raises(ValueError, match=r"audio is \(2, 2"):
        small()(visual, audio[:, :2])
    with pytest.raises(ValueError, match="6 segments"):
        small()(*clips(1, segments=6))


def test_contextualize_takes_replaced_embeddings() -> None:
    model = small().eval()
    local, visual_present, audio_present = model.embed(*clips(2))
    replaced = local.visual_local.clone()
    replaced[0, 1] = 0.5
    before = model.contextualize(local.visual_local, local.audio_local, visual_present, audio_present)
    after = model.contextualize(replaced, local.audio_local, visual_present, audio_present)
    assert not torch.allclose(before.visual_tokens[0], after.visual_tokens[0], atol=1e-3)
    assert not torch.allclose(before.multimodal_tokens[0, 4:], after.multimodal_tokens[0, 4:], atol=1e-3)
    assert torch.equal(before.audio_tokens, after.audio_tokens)
    assert torch.equal(before.multimodal_tokens[1], after.multimodal_tokens[1])


def test_pixels_may_be_bytes() -> None:
    model = small().eval()
    pixels = torch.randint(0, 256, (1, 2, 3, 4, 24, 24), dtype=torch.uint8)
    normalized = (pixels.double() / 255 - 0.45) / 0.225
    torch.testing.assert_close(model(pixels, None).visual_pooled, model(normalized.float(), None).visual_pooled)


@pytest.mark.parametrize(("kernel", "stride", "size"), [
    *(((3, 1, 1), (1, 1, 1), (frames, 7, 7)) for frames in (1, 2, 3, 4)),
    *(((5, 7, 7), (2, 2, 2), (frames, 12, 12)) for frames in (1, 2, 3, 4, 5, 8)),
    *(((5, 7, 7), (1, 2, 2), (8, side, side)) for side in (2, 4, 6, 7)),
    *(((5, 1, 1), (8, 1, 1), (frames, 4, 4)) for frames in (1, 2, 4, 5, 9)),
    *(((1, 3, 3), (1, 2, 2), (2, side, side)) for side in (1, 2, 3)),
    *(((3, 3), (2, 2), (side, side)) for side in (1, 2, 3)),
    *(((1, 3), (1, 2), (4, side)) for side in (1, 2, 3)),
])
@pytest.mark.parametrize("channels", [3, 64])
def test_convolutions_are_right_in_bfloat16(kernel: tuple[int, ...], stride: tuple[int, ...], size: tuple[int, ...],
                                            channels: int) -> None:
    """Against float64. A plain convolution's weight gradient is garbage for many of these sizes on some CPUs."""
    torch.manual_seed(0)
    convolution, exactly = ((Conv2d, torch.nn.functional.conv2d) if len(kernel) == 2 else
                            (Conv3d, torch.nn.functional.conv3d))
    channels_last = torch.channels_last if len(kernel) == 2 else torch.channels_last_3d
    padding = tuple(extent // 2 for extent in kernel)
    layer = convolution(channels, 64, kernel, stride, padding, bias=False)  # type: ignore[arg-type]
    values = torch.randn(4, channels, *size)
    for memory_format in (torch.contiguous_format, channels_last):
        layer = layer.to(memory_format=memory_format)
        layer.weight.grad = None
        x = values.clone(memory_format=memory_format).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(x)
        gradient = torch.randn_like(output)
        output.backward(gradient)
        exact_x, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (x, layer.weight))
        exact = exactly(exact_x, exact_weight, stride=stride, padding=padding)
        exact.backward(gradient.double())
        for rounded, reference in ((output, exact), (x.grad, exact_x.grad), (layer.weight.grad, exact_weight.grad)):
            assert rounded is not None and reference is not None
            assert (rounded.double() - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize("visual", ["slow50", "slowfast50"])
@pytest.mark.parametrize(("frames", "side"), [(1, 40), (2, 40), (3, 40), (4, 40), (16, 40), (8, 8), (8, 16)])
def test_bfloat16_gradients_of_the_visual_network(visual: str, frames: int, side: int) -> None:
    """At lengths and sizes that an option reaches, down to maps smaller than their kernels inside the network."""
    model = small(visual=visual, visual_width=16, visual_blocks=(1, 1, 1, 1)).visual_cnn.eval()
    pixels = torch.randn(4, 3, frames, side, side)
    gradients = []
    for bfloat16 in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            pooled = model(pixels)
        pooled.float().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.dim() == 5])
    for exact, rounded in zip(*gradients, strict=True):
        assert (exact - rounded).norm() < 0.3 * exact.norm()  # rounding adds up to a tenth; garbage is 0.7 and more


def test_log_mels_are_brought_to_zero_mean() -> None:
    plain, shifted = small(), small(log_mel_mean=-3.0, log_mel_std=4.0)
    _, audio = clips(2)
    expected, found = plain(None, audio), shifted(None, audio * 4 - 3)
    assert torch.allclose(found.audio_pooled, expected.audio_pooled, atol=1e-4)
    assert not torch.allclose(shifted(None, audio).audio_pooled, expected.audio_pooled, atol=1e-1)


@pytest.mark.parametrize("present", ["xxxxxxxx", "xxxxx..."])
def test_attention_under_autocast_is_the_formulas(present: str) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 8, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    attend = mask(present, present)[:, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attention(query, key, value, attend, 0.0)
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    scores = (exact[0] @ exact[1].mT / 2).masked_fill(~attend, -torch.inf)
    expected = scores.softmax(-1) @ exact[2]
    gradient = torch.randn_like(expected)
    mixed.backward(gradient.to(mixed.dtype))
    expected.backward(gradient)
    assert (mixed.double() - expected).abs().max() < 0.01
    for ours, theirs in zip((query, key, value), exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert (ours.grad.double() - theirs.grad).norm() < 0.01 * theirs.grad.norm()


@pytest.mark.seconds
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, from inside its compiler
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_encoder_equals_eager(backend: str) -> None:
    # In float64: the compiler adds in another order, which float32 shows where gradients of 40 leave one of 0.01.
    encoder = small(dropout=0.0).encoder.double()
    compiled = copy.deepcopy(encoder)
    x, present = torch.randn(2, 4, 16, dtype=torch.float64), mask("xxxx", "xx..")

    def run(module: torch.nn.Module, x: Tensor) -> Tensor:
        folded = module.fold()  # type: ignore[operator]
        return torch.stack([module(x, present, transformer, folded) for transformer in range(3)])

    expected = run(encoder, x)
    actual = torch.compile(run, backend=backend, fullgraph=True)(compiled, x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    # not squares: after a LayerNorm their sum is constant, and its gradient nothing but rounding
    weight = torch.randn_like(x)
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    for (name, ours), theirs in zip(compiled.named_parameters(), encoder.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_presets_see_motion(preset: str) -> None:
    """Pictures in another order give another embedding: the visual network has temporal kernels that matter."""
    config = read_config(preset)
    torch.manual_seed(0)
    cnn = AVBert(config.model).visual_cnn.eval()
    pixels = torch.randn(1, 3, config.data.segment_frames, config.data.crop, config.data.crop)
    with torch.no_grad():
        forwards, backwards = cnn(pixels), cnn(pixels.flip(2))
    assert (forwards - backwards).norm() > 0.02 * forwards.norm()


def test_a_narrow_audio_cnn_trains_on_two_threads() -> None:
    """In a process of its own: oneDNN's strided 1 x 1 convolution of few channels ends it, or corrupts its memory."""
    code = ("import torch; from avtrain.models.cnn import AudioCNN\n"
            "torch.set_num_threads(2); n = AudioCNN(8, (2, 1), 2)\n"
            "for _ in range(30): n(torch.randn(9, 1, 32, 32)).sum().backward()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120,
                          cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr[-300:]


def test_that_convolution_is_torchs() -> None:
    own = Conv2d(8, 32, 1, stride=2, bias=False).double()
    x = torch.randn(3, 8, 10, 12, dtype=torch.float64)
    assert torch.allclose(own(x), torch.nn.functional.conv2d(x, own.weight, stride=2), atol=1e-12)
