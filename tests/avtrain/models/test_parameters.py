"""Parameter counts: every row of the paper's comparison, the published sizes, and that sharing is real sharing."""

from __future__ import annotations

import pytest
import torch

from avtrain.config import ModelConfig, read_config
from avtrain.models.avbert import AVBert


def on_meta(config: ModelConfig) -> AVBert:
    with torch.device("meta"):
        return AVBert(config)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("fusion", "layers", "transformers", "rank", "expected"), [
    ("mid", False, False, None, 127_581_696),
    ("mid", False, True, None, 42_527_232),
    ("mid", True, False, None, 21_263_616),
    ("mid", True, True, None, 7_087_872),
    ("mid", True, True, 128, 3_843_840),
    ("early", False, False, None, 42_527_232),
    ("early", True, False, None, 7_087_872),
    ("early", True, False, 128, 1_877_760),
    ("late", False, False, None, 85_054_464),
    ("late", True, False, None, 14_175_744),
    ("late", True, True, None, 7_087_872),
    ("late", True, True, 128, 2_860_800),
])
def test_transformer_parameters(fusion: str, layers: bool, transformers: bool, rank: int | None, expected: int) -> None:
    config = ModelConfig(fusion=fusion, share_layers=layers, share_transformers=transformers, rank=rank)
    assert count(on_meta(config).encoder) == expected


def test_published_sizes() -> None:
    model = on_meta(read_config("paper").model)
    assert (count(model), count(model.visual_cnn), count(model.audio_cnn)) == (43_778_080, 31_672_128, 5_839_840)


def test_slowfast_is_the_published_width() -> None:
    model = on_meta(ModelConfig(visual="slowfast50"))
    assert model.visual_cnn.outputs == 2304
    # Kinetics-400's SlowFast 8x8, R50 has 34.48 M parameters with its 400-class layer, as its authors' model zoo says
    # for 5-frame lateral kernels at ratio 2 (34.57 M with 7-frame ones).
    assert abs(count(model.visual_cnn) + 2304 * 400 + 400 - 34.48e6) < 0.1e6


@pytest.mark.parametrize("share_layers", [False, True])
@pytest.mark.parametrize("share_transformers", [False, True])
def test_a_shared_weight_is_saved_once(share_layers: bool, share_transformers: bool) -> None:
    sizes = {"dimension": 32, "heads": 2, "feedforward": 64, "layers": 3, "rank": 8}
    model = AVBert(ModelConfig(share_layers=share_layers, share_transformers=share_transformers, **sizes))
    names = [name for name in model.encoder.state_dict() if name.endswith("feedforward_in.shared")]
    layers, stacks = 1 if share_layers else 3, 1 if share_transformers else 3
    assert names == [f"stacks.{stack}.{layer}.feedforward_in.shared" for stack in range(stacks)
                     for layer in range(layers)]
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()]
    assert len(pointers) == len(set(pointers))
