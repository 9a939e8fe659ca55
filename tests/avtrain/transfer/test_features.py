"""Frozen features: the model's own outputs, cached, and never mixed up."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import save

from avtrain.config import DataConfig, ModelConfig
from avtrain.data.clips import ClipDataset
from avtrain.data.order import fixed_order
from avtrain.data.shards import open_folders
from avtrain.errors import AvtrainError
from avtrain.models.avbert import AVBert
from avtrain.runtime import Runtime
from avtrain.transfer.features import frozen_features

DATA = DataConfig(segment_frames=4, crop=24, scale=(24, 32), workers=0)
MODEL = ModelConfig(visual_width=8, visual_blocks=(1, 1), audio_width=8, audio_blocks=(1, 1), audio_stem_stride=4,
                    dimension=32, layers=1, heads=2, feedforward=64, rank=8)
CPU = Runtime(torch.device("cpu"), None)


@pytest.fixture(scope="module")
def folder(media, small_demo, avprep, tmp_path_factory):
    """Five clips of the demo, one recording without picture, one video without sound."""
    root = tmp_path_factory.mktemp("features")
    for path in sorted((small_demo / "train").rglob("*.mp4"))[:5]:
        (root / "raw" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / "raw" / path.parent.name)
    (root / "raw" / "dog").mkdir()
    shutil.copy(media / "esc10" / "001 - Dog bark" / "1-100032-A.ogg", root / "raw" / "dog")
    shutil.copy(media / "mmaction_demo.mp4", root / "raw" / "dog")
    done = avprep("build", "--dataset", "folder", "--raw", root / "raw", "--out", root)
    assert done.returncode == 0, done.stderr
    return open_folders([str(root / "folder" / "train")])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AVBert(MODEL)


def test_they_are_the_models_outputs_and_the_mode_is_kept(folder, model):
    features = frozen_features(model, folder, DATA, CPU)
    assert model.training
    dataset = ClipDataset(folder, DATA, None)
    batch = dataset.__getitems__([(place, 0) for place in fixed_order([shard.clips for shard in folder.shards])])
    with torch.no_grad():
        expected = model.eval()(*batch.tensors(CPU.device))
    assert features.keys == batch.keys and features.labels == batch.labels and len(set(features.keys)) == 7
    assert torch.equal(features.audio_present, batch.audio_present)
    for name in ("visual_pooled", "audio_pooled", "visual_local", "audio_local", "visual_tokens", "multimodal_tokens"):
        torch.testing.assert_close(getattr(features, name), getattr(expected, name), atol=1e-5, rtol=1e-4)


def test_the_cache_is_used_and_another_model_or_view_has_its_own(folder, model, tmp_path, monkeypatch):
    first = frozen_features(model, folder, DATA, CPU, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(AVBert, "forward", None)  # nothing is computed
        again = frozen_features(model, folder, DATA, CPU, tmp_path)
    assert again.keys == first.keys and again.labels == first.labels
    assert torch.equal(again.multimodal_tokens, first.multimodal_tokens)
    shorter = frozen_features(model, folder, DataConfig(segments=2, segment_frames=4, crop=24, scale=(24, 32),
                                                        workers=0), CPU, tmp_path)
    assert shorter.visual_pooled.shape[1] == 2
    with torch.no_grad():
        next(model.audio_cnn.parameters()).mul_(-1)
    other = frozen_features(model, folder, DATA, CPU, tmp_path)
    assert not torch.allclose(other.audio_pooled, first.audio_pooled)
    torch.testing.assert_close(other.visual_pooled, first.visual_pooled)
    assert len(list(tmp_path.iterdir())) == 3


def test_settings_without_weights_have_their_own_cache(folder, model, tmp_path):
    first = frozen_features(model, folder, DATA, CPU, tmp_path)
    shifted = AVBert(dataclasses.replace(model.config, log_mel_mean=model.config.log_mel_mean - 3))
    shifted.load_state_dict(model.state_dict())
    other = frozen_features(shifted, folder, DATA, CPU, tmp_path)
    assert not torch.allclose(other.audio_pooled, first.audio_pooled)


def test_a_damaged_cache_is_made_again(folder, model, tmp_path):
    first = frozen_features(model, folder, DATA, CPU, tmp_path)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    others = save({"visual_pooled": first.visual_pooled[:1]}, {"clips": json.dumps([first.keys, first.labels])})
    for damaged in (whole[:200], others):
        path.write_bytes(damaged)
        assert torch.equal(frozen_features(model, folder, DATA, CPU, tmp_path).visual_pooled, first.visual_pooled)
        assert path.read_bytes() == whole


def test_a_folder_in_a_cache_files_place_is_named_before_anything_is_computed(folder, model, tmp_path, monkeypatch):
    frozen_features(model, folder, DATA, CPU, tmp_path)
    [path] = tmp_path.iterdir()
    path.unlink()
    path.mkdir()
    monkeypatch.setattr(AVBert, "forward", None)
    with pytest.raises(AvtrainError, match=f"{path} is no file, where features are kept"):
        frozen_features(model, folder, DATA, CPU, tmp_path)
