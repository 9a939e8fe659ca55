"""Frozen features: the model's own outputs, kept in files, and never mixed up."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from avtrain.config import DataConfig, ModelConfig
from avtrain.data.clips import ClipDataset
from avtrain.data.order import fixed_order
from avtrain.data.shards import open_folders
from avtrain.data.views import Views
from avtrain.errors import AvtrainError
from avtrain.models.avbert import AVBert
from avtrain.runtime import Runtime
from avtrain.transfer.feature_file import FeatureRows
from avtrain.transfer.features import clip_means, segment_outputs, view_features

DATA = DataConfig(segment_frames=4, crop=24, scale=(24, 32), workers=0)
MODEL = ModelConfig(visual_width=8, visual_blocks=(1, 1), audio_width=8, audio_blocks=(1, 1), audio_stem_stride=4,
                    dimension=32, layers=1, heads=2, feedforward=64, rank=8)
CPU = Runtime(torch.device("cpu"), None)
SOUND = Views("audio", 2)


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


def _rows(model, folder, cache, views=SOUND):
    """All features of views, and the clip of each row."""
    file = view_features(model, folder, DATA, views, CPU, cache)
    rows = FeatureRows.of_clips([file], "pooled", [folder.clips], folder.rows.numbers())
    return rows[:], rows.clips


def test_they_are_the_models_outputs_and_the_mode_is_kept(folder, model, tmp_path, monkeypatch):
    monkeypatch.setattr("avtrain.transfer.features._CLIPS_AT_ONCE", 3)
    parts = list(segment_outputs(model, folder, DATA, CPU))
    assert model.training and [len(part.clips) for part in parts] == [3, 3, 1]
    dataset = ClipDataset(folder, DATA, None)
    batch = dataset.__getitems__([(place, 0) for place in fixed_order([shard.clips for shard in folder.shards])])
    with torch.no_grad():
        expected = model.eval()(*batch.tensors(CPU.device))
    assert [key for part in parts for key in part.batch.keys] == batch.keys == folder.rows.keys()
    assert np.concatenate([part.clips for part in parts]).tolist() == list(range(7))
    visual, audio = (tokens[:, 1:] for tokens in expected.multimodal_tokens.chunk(2, 1))
    mean = torch.stack([
        torch.stack([token for token, there in ((visual[clip, segment], batch.visual_present[clip, segment]),
                                                (audio[clip, segment], batch.audio_present[clip, segment])) if there]
                    or [torch.zeros(32)]).mean(0)
        for clip in range(7) for segment in range(15)]).view(7, 15, 32)
    for name, wanted in (("visual_local", expected.visual_local), ("audio_local", expected.audio_local),
                         ("multimodal", mean)):
        torch.testing.assert_close(torch.cat([part.tensors[name] for part in parts]), wanted, atol=1e-5, rtol=1e-4)
    file = clip_means(model, folder, DATA, CPU, tmp_path)
    both = (batch.visual_present.any(1) & batch.audio_present.any(1)).nonzero()[:, 0]
    assert file.clips.tolist() == both.tolist() and len(both) == 5
    for name, local, present in (("visual", expected.visual_local, batch.visual_present),
                                 ("audio", expected.audio_local, batch.audio_present)):
        wanted = torch.stack([local[clip][present[clip]].mean(0) for clip in both])
        torch.testing.assert_close(torch.from_numpy(file.read(name, np.arange(5))), wanted, atol=1e-5, rtol=1e-4)


def test_a_file_is_used_again_and_another_model_or_view_has_its_own(folder, model, tmp_path, monkeypatch):
    first, clips = _rows(model, folder, tmp_path)
    assert clips.tolist() == [clip for clip in range(7) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(AVBert, "embed", None)  # nothing is computed
        assert torch.equal(_rows(model, folder, tmp_path)[0], first)
    assert len(_rows(model, folder, tmp_path, Views("audio", 3))[0]) == 21
    with torch.no_grad():
        next(model.audio_cnn.parameters()).mul_(-1)
    assert not torch.allclose(_rows(model, folder, tmp_path)[0], first)
    assert len(list(tmp_path.iterdir())) == 3


def test_settings_without_weights_have_their_own_file(folder, model, tmp_path):
    first, _ = _rows(model, folder, tmp_path)
    shifted = AVBert(dataclasses.replace(model.config, log_mel_mean=model.config.log_mel_mean - 3))
    shifted.load_state_dict(model.state_dict())
    assert not torch.allclose(_rows(shifted, folder, tmp_path)[0], first)


def _with_another_clip(content):
    """The first row's clip is one that the folder does not have."""
    first_row = content.index(b"\n") + 1
    return content[:first_row] + (99).to_bytes(8, "little") + content[first_row + 8:]


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:200], lambda content: content[:-4],
    lambda content: content[:-4] + np.float32("nan").tobytes(), lambda content: content.replace(b"pooled", b"polled"),
    _with_another_clip], ids=["empty", "cut in its header", "cut", "nan", "other names", "another clip"])
def test_a_damaged_file_is_made_again(folder, model, tmp_path, damage):
    first, _ = _rows(model, folder, tmp_path)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert torch.equal(_rows(model, folder, tmp_path)[0], first)
    assert path.read_bytes() == whole


def test_stopped_while_it_is_written_it_leaves_nothing_and_what_a_killed_run_left_goes(folder, model, tmp_path,
                                                                                      monkeypatch):
    _rows(model, folder, tmp_path)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    path.unlink()
    (tmp_path / f".{path.name}.1.npy").write_bytes(whole[:1000])
    (tmp_path / ".another.1.npy").touch()
    embed, left = AVBert.embed, [2]

    def stopped(*arguments):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return embed(*arguments)

    monkeypatch.setattr("avtrain.transfer.features._SEGMENTS_AT_ONCE", 4)
    with monkeypatch.context() as patch:
        patch.setattr(AVBert, "embed", stopped)
        with pytest.raises(KeyboardInterrupt):
            _rows(model, folder, tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == [".another.1.npy"]
    _rows(model, folder, tmp_path)
    assert path.is_file()


def test_a_folder_in_a_files_place_is_named_before_anything_is_computed(folder, model, tmp_path, monkeypatch):
    _rows(model, folder, tmp_path)
    [path] = tmp_path.iterdir()
    path.unlink()
    path.mkdir()
    monkeypatch.setattr(AVBert, "embed", None)
    with pytest.raises(AvtrainError, match=f"{path} is no file, where features are kept"):
        _rows(model, folder, tmp_path)
