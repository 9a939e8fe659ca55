"""Our model against what the authors' code computed, and their checkpoints read strictly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from redrawn import drawn
from torch import Tensor

import avtrain
from avtrain.models.avbert import AVBert, AVBertOutput
from avtrain.released import load_released_heads


@pytest.fixture(scope="module")
def model(released_state: dict[str, Tensor]) -> AVBert:
    return avtrain.load_released(released_state)


@pytest.fixture(scope="module")
def output(model: AVBert) -> AVBertOutput:
    visual = drawn("input.visual", (1, 3, 3, 32, 112, 112)).float()
    audio = drawn("input.audio", (1, 3, 1, 80, 128)).float()
    with torch.no_grad():
        result = model(visual, audio)
    assert isinstance(result, AVBertOutput)
    return result


def assert_equal(ours: Tensor | None, theirs: np.ndarray) -> None:
    assert ours is not None
    assert np.abs(ours.detach().reshape(theirs.shape).numpy() - theirs).max() <= 1e-4


@pytest.mark.parametrize("field", ["visual_pooled", "audio_pooled", "visual_tokens", "audio_tokens",
                                   "multimodal_tokens"])
def test_whole_model_equals_the_authors(output: AVBertOutput, reference: dict[str, np.ndarray], field: str) -> None:
    assert_equal(getattr(output, field), reference[field])


@pytest.mark.parametrize(("transformer", "name"), [(0, "visual"), (1, "audio"), (2, "multimodal")])
def test_encoder_equals_the_authors(model: AVBert, reference: dict[str, np.ndarray], transformer: int, name: str,
                                    ) -> None:
    hidden = drawn("input.hidden", (2, 16, 768)).float()
    present = torch.ones(2, 16, dtype=torch.bool)
    with torch.no_grad():
        folded = model.encoder.fold()
        assert_equal(model.encoder(hidden, present, transformer, folded), reference[f"encoder_{name}"])
        widened = folded[transformer][0].feedforward_in.apply(hidden[:1])
    assert_equal(widened, reference[f"lowrank_ffn_{name}"])


def test_heads_equal_the_authors(output: AVBertOutput, released_state: dict[str, Tensor],
                                 reference: dict[str, np.ndarray]) -> None:
    clip, sequence = load_released_heads(released_state)
    assert output.multimodal_tokens is not None
    with torch.no_grad():
        assert_equal(clip(output.visual_pooled, output.audio_pooled), reference["clip_logits"])
        assert_equal(sequence(output.multimodal_tokens), reference["sequence_logits"])
