"""Shards to batches: the order, exactly once; pixels against PyAV's own; what is absent; what is broken."""

import functools
import http.server
import io
import json
import shutil
import tarfile
import threading
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from manifest_of import add_manifests
from padded import padded

from avtrain.config import DataConfig
from avtrain.data.augment import View, another_recording, masked_log_mel, pixels
from avtrain.data.clips import ClipDataset, check_spec
from avtrain.data.decode import Planes, decode_frames
from avtrain.data.loader import UnreadableCount, batches
from avtrain.data.order import at_epoch, batches_of, epoch_order, fixed_order
from avtrain.data.shards import ShardReader, open_folders
from avtrain.errors import AvtrainError, TooManyUnreadable

TINY = DataConfig(segment_frames=8, crop=40, scale=(46, 56))


@pytest.fixture(scope="module")
def folders(demo_shards):
    """The small demo's train split in ten shards, and its test split."""
    return demo_shards / "train", demo_shards / "test"


@pytest.fixture(scope="module")
def mixed(media, avprep, tmp_path_factory):
    """Real clips: with and without sound or picture, long and short."""
    root = tmp_path_factory.mktemp("mixed")
    (root / "raw").mkdir()
    for name in ("pancake.mkv", "mmaction_demo.mp4", "h265.mp4", "bigbuckbunny.mp4", "nasa.mp4"):
        shutil.copy(media / name, root / "raw")
    shutil.copy(media / "esc10" / "001 - Dog bark" / "1-100032-A.ogg", root / "raw")
    done = avprep("build", "--dataset", "folder", "--raw", root / "raw", "--out", root)
    assert done.returncode == 0, done.stderr
    return root / "folder" / "train"


def _all(folder, places, workers, epoch=0, seed=0):
    return [padded(batch) for batch in batches(ClipDataset(folder, TINY, seed), at_epoch(places, epoch), workers)]


def _rgb(planes, view, crop):
    rgb = torch.full((3, len(planes.luma), crop, crop), 99, dtype=torch.uint8)
    pixels(planes, view, rgb)
    return rgb


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_the_same_on_any_number_of_workers(folders, workers):
    folder = open_folders([str(folders[0]), str(folders[1])])
    assert folder.clips == 12
    order = epoch_order([shard.clips for shard in folder.shards], 0, 0, 8)
    ours = _all(folder, batches_of(order, 5), workers)
    keys = [key for batch in ours for key in batch.keys]
    assert len(set(keys)) == len(keys) == 12 and [len(batch.keys) for batch in ours] == [5, 5, 2]
    again = _all(folder, batches_of(order, 5)[1:], 0)  # from the middle of an epoch on
    for one, other in zip(ours[1:], again, strict=True):
        assert one.keys == other.keys and torch.equal(one.visual, other.visual) and torch.equal(one.audio, other.audio)
    other_epoch = _all(folder, batches_of(order, 5)[:1], 0, epoch=1)
    assert not torch.equal(other_epoch[0].visual, ours[0].visual)


def test_pixels_are_pyavs(folders):
    folder = open_folders([str(folders[0])])
    mp4 = ShardReader(folder).read(0, 0)[1]["mp4"]
    with av.open(io.BytesIO(mp4)) as container:
        theirs = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    height = theirs.shape[1]
    planes = decode_frames(mp4, 1)
    ours = _rgb(planes, View(1.0, 0.0, 0.5, False), height)  # a square of full height, nothing resized
    left = round((theirs.shape[2] - height) / 2)
    difference = np.abs(ours.numpy().astype(int) - theirs[:, :, left:left + height].transpose(3, 0, 1, 2))
    assert difference.mean() < 1.5 and difference.max() <= 4
    flipped = _rgb(planes, View(1.0, 0.0, 0.5, True), height)
    assert torch.equal(flipped, ours.flip(-1))
    part = decode_frames(mp4, 4, 64, 96)
    assert np.array_equal(part.luma, planes.luma[64:96:4]) and np.array_equal(part.chroma, planes.chroma[64:96:4])
    assert folder.spec["reference_step"] == 4
    for step in (4, 8):  # what nothing is predicted from need not be decoded
        part = decode_frames(mp4, step, 32, 480, references=True)
        assert np.array_equal(part.luma, planes.luma[32::step]) and np.array_equal(part.chroma, planes.chroma[32::step])


@pytest.mark.parametrize("bt709", [False, True])
@pytest.mark.parametrize("frames", [1, 6, 19])
def test_every_colour_is_the_standards_and_nearly_swscales(bt709, frames):
    random, height, width = np.random.default_rng(frames), 48, 64
    luma = random.integers(0, 256, (frames, height, width), dtype=np.uint8)
    chroma = random.integers(0, 256, (frames, 2, height // 2, width // 2), dtype=np.uint8)
    ours = _rgb(Planes(luma, chroma, bt709), View(1.0, 0.0, 0.0, False), height).numpy()
    y = (luma[:, :, :height] - 16.0) / 219
    u, v = np.moveaxis(chroma.repeat(2, 2).repeat(2, 3)[..., :height] - 128.0, 1, 0) / 112
    of_red, of_blue = (0.2126, 0.0722) if bt709 else (0.299, 0.114)  # the standards' weights of luma
    red, blue = y + (1 - of_red) * v, y + (1 - of_blue) * u
    green = (y - of_red * red - of_blue * blue) / (1 - of_red - of_blue)
    np.testing.assert_allclose(ours, (np.stack((red, green, blue)) * 255).clip(0, 255), atol=0.51)
    space = "ITU709" if bt709 else "ITU601"
    theirs = np.stack([av.VideoFrame.from_ndarray(
        np.concatenate((one.ravel(), other.ravel())).reshape(-1, width), "yuv420p").reformat(
            format="rgb24", src_colorspace=space, dst_colorspace=space, src_color_range="MPEG",
            dst_color_range="JPEG").to_ndarray() for one, other in zip(luma, chroma, strict=True)])
    assert np.abs(ours.astype(int) - theirs[:, :, :height].transpose(3, 0, 1, 2)).max() <= 4


@pytest.mark.parametrize("crop", [32, 79, 80, 112, 129])  # with chroma as fine as the pixels, and half as fine
@pytest.mark.parametrize("flip", [False, True])
def test_a_view_is_the_square_of_pyavs_frames_resized(mixed, crop, flip):
    folder = open_folders([str(mixed)])
    clips = (ShardReader(folder).read(*place) for place in fixed_order([shard.clips for shard in folder.shards]))
    mp4 = next(members["mp4"] for key, members in clips if key.startswith("bigbuckbunny"))
    with av.open(io.BytesIO(mp4)) as container:
        theirs = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][:21])
    height, width = theirs.shape[1:3]
    side, top, left = 112, 24, 60
    view = View(side / height, top / (height - side), left / (width - side), flip)
    square = torch.from_numpy(theirs[:, top:top + side, left:left + side].transpose(3, 0, 1, 2).astype(np.float32))
    expected = F.interpolate(square, (crop, crop), mode="bilinear", antialias=True)
    planes = decode_frames(mp4, 1, 0, 21)
    ours = _rgb(planes, view, crop)
    difference = ((ours.flip(-1) if flip else ours) - expected).abs()
    assert difference.mean() < 2 and difference.mean((0, 2, 3)).max() < 2.5
    one = Planes(planes.luma[20:], planes.chroma[20:], planes.bt709)
    assert torch.equal(_rgb(one, view, crop)[:, 0], ours[:, 20])
    longer = torch.full((3, 24, crop, crop), 99, dtype=torch.uint8)
    pixels(planes, view, longer)
    assert torch.equal(longer[:, :21], ours) and (longer[:, 21:] == 99).all()


def test_log_mel_segments_are_slices(folders):
    folder = open_folders([str(folders[0])])
    key, members = ShardReader(folder).read(3, 0)
    stored = np.load(io.BytesIO(members["logmel.npy"])).astype(np.float32)
    [batch] = _all(folder, [[fixed_order([1] * 10)[3]]], 0, seed=None)
    assert batch.keys == [key]
    for segment in range(15):
        assert np.array_equal(batch.audio[0, segment, 0].numpy(), stored[:, 128 * segment:128 * (segment + 1)])


def test_one_modality_is_the_same_without_the_other(mixed):
    folder = open_folders([str(mixed)])
    places = [fixed_order([shard.clips for shard in folder.shards])]
    both, sound, pictures = (
        padded(next(batches(ClipDataset(folder, replace(TINY, modality=modality), None), at_epoch(places, 0), 0)))
        for modality in ("both", "audio", "visual"))
    assert torch.equal(sound.audio, both.audio) and torch.equal(sound.audio_present, both.audio_present)
    assert torch.equal(pictures.visual, both.visual) and torch.equal(pictures.visual_present, both.visual_present)
    assert not sound.visual_present.any() and sound.visual.numel() == 0
    assert not pictures.audio_present.any() and not pictures.audio.any()
    assert both.visual_present.any() and both.audio_present.any()


def test_what_is_not_wanted_is_not_read(folders):
    reader = ShardReader(open_folders([str(folders[0])]))
    endings = {modality: set(reader.read(0, 0, modality)[1]) for modality in ("both", "audio", "visual")}
    assert endings["both"] == {"mp4", "logmel.npy"}
    assert endings["audio"] == {"logmel.npy"} and endings["visual"] == {"mp4"}


def test_sound_alone_starts_anywhere_in_training(mixed):
    """Two segments of 2 s are slices of a recording of 5 s."""
    folder = open_folders([str(mixed)])
    reader = ShardReader(folder)
    [position] = [position for position in range(folder.clips) if "mp4" not in reader.read(0, position)[1]]
    stored = np.load(io.BytesIO(reader.read(0, position)[1]["logmel.npy"])).astype(np.float32)
    dataset = ClipDataset(folder, replace(TINY, segments=2, frequency_mask=0.0, time_mask=0.0), 0)
    place, starts = fixed_order([folder.clips])[position], set()
    assert 2 * 128 < stored.shape[1] < 3 * 128
    for epoch in range(20):
        clip = padded(dataset[place, epoch])
        assert clip.audio_present.tolist() == [[True, True]]
        heard = torch.cat((clip.audio[0, 0, 0], clip.audio[0, 1, 0]), 1).numpy()
        found = [start for start in range(stored.shape[1] - 255) if np.array_equal(heard, stored[:, start:start + 256])]
        assert found
        starts.update(found[:1])
    assert len(starts) > 5 and max(starts) > 20


def test_datasets_of_different_classes_go_together_where_labels_are_not_used(folders, mixed):
    with pytest.raises(AvtrainError, match="its classes differ"):
        open_folders([str(folders[0]), str(mixed)])
    together = open_folders([str(folders[0]), str(mixed)], labelled=False)
    assert together.clips == 10 + open_folders([str(mixed)]).clips and together.classes == ()


def test_masking_hides_one_band_and_one_stretch_of_each_segment():
    segments = np.random.default_rng(0).standard_normal((3, 80, 128)).astype(np.float32)
    sizes, alike = set(), 0
    for seed in range(40):
        changed = masked_log_mel(segments, 0.1, 0.1, np.random.default_rng(seed)) != segments
        for of_one in changed:
            rows, columns = of_one.all(1), of_one.all(0)
            assert np.array_equal(of_one, rows[:, None] | columns[None])
            for line, most in ((rows, 8), (columns, 12)):
                assert line.sum() <= most and (np.diff(line.astype(int)) == 1).sum() <= 1
                sizes.add(int(line.sum()))
        alike += np.array_equal(changed[0], changed[1])
    # A mask that a clip's segments share would tell which clip this is.
    assert len(sizes) > 5 and alike <= 4


def test_another_recording_filters_every_segment_by_itself():
    segments = np.repeat(np.random.default_rng(0).standard_normal((1, 80, 128)), 400, 0).astype(np.float32)
    gains = another_recording(segments, 1.5, (), 0, np.random.default_rng(1)) - segments
    assert gains.dtype == np.float32 and (np.ptp(gains, axis=2) < 1e-5).all()  # the same all through a segment
    by_band = gains[..., 0]
    assert len(np.unique(by_band[:, 0])) == 400
    # The gain of all bands and that of the first point add up; bands far apart share only the former.
    assert by_band[:, 0].std() == pytest.approx(1.5 * 2 ** 0.5, rel=0.15)
    assert np.corrcoef(by_band[:, 0], by_band[:, 79])[0, 1] == pytest.approx(0.5, abs=0.15)
    assert np.abs(np.diff(by_band, axis=1)).max() < 1.0  # smooth: six points over 80 bands


def test_another_recording_adds_noise_of_the_level_that_is_asked_for():
    silence = np.full((200, 80, 128), -13.8, np.float32)
    loud = np.full((200, 80, 128), 5.0, np.float32)
    noisy = another_recording(silence, 0.0, (-9.0, -3.0), 0, np.random.default_rng(1))
    levels = np.log(np.exp(noisy).mean(2))  # by band
    middle = levels[:, 38:42].mean(1)
    assert -9.5 < middle.min() < -8.5 and -3.5 < middle.max() < -2.5
    assert (levels[:, -1] - levels[:, 0]).std() == pytest.approx(2, rel=0.2)
    assert np.abs(another_recording(loud, 0.0, (-9.0, -3.0), 0, np.random.default_rng(1)) - loud).max() < 0.1


def test_another_recording_shifts_bands():
    bands = np.broadcast_to(np.arange(80, dtype=np.float32)[:, None], (100, 80, 128))
    shifted = another_recording(bands, 0.0, (), 3, np.random.default_rng(1))
    shifts = shifted[:, 40, 0] - 40
    assert set(shifts) == {-3, -2, -1, 0, 1, 2, 3}
    for segment, shift in zip(shifted, shifts, strict=True):
        assert np.array_equal(segment[:, 5], np.clip(np.arange(80) + shift, 0, 79))


def test_another_recording_is_for_training_alone(folders):
    folder = open_folders([str(folders[0])])
    place = fixed_order([1] * 10)[0]
    options = replace(TINY, equalizer=1.0, noise=(-9.0, -3.0), frequency_shift=2)
    plain, varied, again, fixed = (ClipDataset(folder, config, seed)[place, 0].audio for config, seed in (
        (TINY, 0), (options, 0), (options, 0), (options, None)))
    assert not torch.equal(varied, plain) and torch.equal(varied, again)
    assert torch.equal(fixed, ClipDataset(folder, TINY, None)[place, 0].audio)


def test_absent_is_absent_and_short_is_short(mixed):
    folder = open_folders([str(mixed)])
    [batch] = _all(folder, [fixed_order([shard.clips for shard in folder.shards])], 0, seed=None)
    present = {key.split("-0000")[0]: (int(seen), int(heard)) for key, seen, heard in zip(
        batch.keys, batch.visual_present.sum(1), batch.audio_present.sum(1), strict=True)}
    assert present.pop(next(key for key in present if key.startswith("1-100032"))) == (0, 3)
    assert present == {"pancake": (5, 5), "mmaction_demo": (5, 0), "h265": (1, 0), "bigbuckbunny": (3, 3),
                       "nasa": (7, 7)}
    assert not batch.visual[~batch.visual_present].any() and not batch.audio[~batch.audio_present].any()
    assert batch.visual.shape == (6, 15, 3, 8, 40, 40) and batch.audio.shape == (6, 15, 1, 80, 128)


def test_unreadable_clips_are_named_and_too_many_stop_the_run(folders, tmp_path):
    source, broken = folders[1] / "test-000000.tar", tmp_path / "test-000000.tar"
    with tarfile.open(source) as tar, tarfile.open(broken, "w") as out:
        first = next(member.name for member in tar if member.name.endswith(".mp4"))
        for member in tar:
            content = tar.extractfile(member).read()
            out.addfile(member, io.BytesIO(b"\0" * len(content) if member.name == first else content))
    index = json.loads((folders[1] / "index.json").read_text())
    index["shardlist"] = index["shardlist"][:1]
    (tmp_path / "index.json").write_text(json.dumps(index))
    add_manifests(tmp_path)
    folder = open_folders([str(tmp_path), str(folders[0])])
    [batch] = _all(folder, [fixed_order([shard.clips for shard in folder.shards])], 0)
    assert len(batch.keys) == folder.clips - 1
    [one] = batch.unreadable
    assert one.shard == str(broken) and one.key == folder.rows[0].key
    assert one.reason.startswith("its video can't be decoded: Invalid data")
    count = UnreadableCount(200)
    count.add(batch.unreadable)
    count.add([replace(one, reason="another")])  # the same clip, an epoch later
    with pytest.raises(TooManyUnreadable, match="1 clips can't be decoded, more than 1 %") as caught:
        UnreadableCount(folder.clips).add(batch.unreadable)
    assert caught.value.clips == [one] and f"\n  {broken}: {one.key}: {one.reason}" in str(caught.value)


def test_shards_come_over_http(folders, tmp_path, monkeypatch):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    monkeypatch.setenv("AVTRAIN_CACHE", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folders[0])) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        remote = open_folders([f"http://127.0.0.1:{server.server_port}"])
        local = open_folders([str(folders[0])])
        assert remote.fingerprint == local.fingerprint
        places = [fixed_order([1] * 10)[:3]]
        [far], [near] = _all(remote, places, 0), _all(local, places, 0)
        server.shutdown()
    assert far.keys == near.keys and torch.equal(far.visual, near.visual)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3 and not list((tmp_path / "cache").glob("*.part"))


def test_what_does_not_fit_is_said(folders, tmp_path):
    folder = open_folders([str(folders[0])])
    with pytest.raises(AvtrainError, match="segments of 32 frames, the model wants 12"):
        check_spec(folder, DataConfig(segment_frames=12))
    with pytest.raises(AvtrainError, match="mel_bands 80, the model wants 64"):
        check_spec(folder, DataConfig(mels=64))
    with pytest.raises(AvtrainError, match="no .*nowhere/index.json"):
        open_folders([str(tmp_path / "nowhere")])
    (tmp_path / "link").symlink_to(folders[0])
    for again in (f"{folders[0]}/", f"{folders[0]}/../train/index.json", str(tmp_path / "link")):
        with pytest.raises(AvtrainError, match="the same shards twice"):
            open_folders([str(folders[0]), again], labelled=False)
    index = json.loads((folders[0] / "index.json").read_text())
    shutil.copy(folders[0] / "clips.parquet", tmp_path)
    for change, message in (({"format_version": 9}, "format version 9"), ({"format": "x"}, "not an index of avprep"),
                            ({"shardlist": None}, "is damaged: no shardlist"),
                            ({"spec": {**index["spec"], "fps": 15}}, "spec differ.*fps 15 and 16"),
                            ({"shardlist": [{**index["shardlist"][0], "url": "../../etc/passwd"}]}, "beside")):
        (tmp_path / "index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(AvtrainError, match=message):
            open_folders([str(folders[0]), str(tmp_path)])
