"""Our model against what the authors' code computed, and their checkpoints read strictly."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from redrawn import drawn
from reference.excerpt import step_of
from torch import Tensor

import avtrain
from avtrain.checkpoints.authors import load_released_heads
from avtrain.errors import AvtrainError
from avtrain.models.avbert import AVBert, AVBertOutput
from avtrain.transfer.features import weights_hash

EXCERPTS = Path(__file__).parents[2] / "reference"


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
    found = ours.detach().numpy()
    found = found.ravel()[::step_of(found.size)] if theirs.ndim == 1 else found.reshape(theirs.shape)
    assert found.shape == theirs.shape and np.abs(found - theirs).max() <= 1e-4


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


@pytest.mark.parametrize(("change", "message"), [
    ("drop", r"missing: avbert\.visual_conv\.s3\.pathway0_res0\.branch1\.weight$"),
    ("reshape", r"avbert\.audio_fc\.bias is \(7,\), not \(768,\)"),
    ("add", r"unknown: avbert\.surplus\.weight$"),
    ("turn", r"base is not the identity"),
])
def test_wrong_tensors_are_named(released_state: dict[str, Tensor], change: str, message: str) -> None:
    state = dict(released_state)
    if change == "drop":
        del state["avbert.visual_conv.s3.pathway0_res0.branch1.weight"]
    elif change == "reshape":
        state["avbert.audio_fc.bias"] = torch.zeros(7)
    elif change == "add":
        state["avbert.surplus.weight"] = torch.zeros(1)
    else:
        name = next(name for name in state if name.endswith(".base"))
        state[name] = -state[name]
    with pytest.raises(AvtrainError, match=message):
        avtrain.load_released(state)


def test_cnn_alone_and_cached_rotations(released_state: dict[str, Tensor], reference: dict[str, np.ndarray],
                                        tmp_path: Path) -> None:
    state = {name.removeprefix("avbert."): tensor for name, tensor in released_state.items()
             if name.startswith("avbert.audio_conv.")}
    path = tmp_path / "esc50.pyth"
    torch.save({"epoch": 3, "state_dict": {**state, "head.projection.weight": torch.zeros(50, 1024),
                                           "cache_B": torch.zeros(2)}}, path)
    model = avtrain.load_released(path)
    assert not model.training
    assert weights_hash(avtrain.load_released(path)) == weights_hash(model)  # the rest too: else nothing is resumed
    with torch.no_grad():
        pooled = model(None, drawn("input.audio", (1, 3, 1, 80, 128)).float()).audio_pooled
    assert_equal(pooled, reference["audio_pooled"])


def test_the_excerpt_is_of_the_whole(shared: Path) -> None:
    whole, excerpt = shared / "reference", EXCERPTS
    assert gzip.decompress((excerpt / "avbert_state_dict.csv.gz").read_bytes()) == (
        whole / "avbert_state_dict.csv").read_bytes()
    with np.load(whole / "avbert_outputs.npz") as one, np.load(excerpt / "avbert_outputs.npz") as other:
        assert set(one) == set(other)
        assert all(np.array_equal(one[name].ravel()[::step_of(one[name].size)], other[name]) for name in one)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "touched",))  # type: ignore[return-value]

    path = tmp_path / "hostile.pyth"
    torch.save({"state_dict": Hostile()}, path)
    with pytest.raises(AvtrainError, match=r"hostile\.pyth: not a checkpoint that can be read safely"):
        avtrain.load_released(path)
    assert not (tmp_path / "touched").exists()
