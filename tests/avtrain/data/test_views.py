"""Where views of a video lie: in time, on the picture, in the sound."""

import io

import numpy as np
import pytest
import torch
from padded import padded

from avtrain.config import DataConfig
from avtrain.data.augment import SoundAugmentation
from avtrain.data.clips import ClipDataset
from avtrain.data.loader import batches
from avtrain.data.shards import ShardReader, open_folders
from avtrain.data.views import Views, start_frames

DATA = DataConfig(segment_frames=32, crop=32, scale=(48, 64), workers=0)


@pytest.mark.parametrize(("length", "count"), [(80, 10), (480, 10), (150, 3), (33, 10)])
def test_clip_i_of_n_starts_at_its_share_of_the_room(length, count):
    starts = start_frames(length, 32, count)
    assert len(starts) == count and starts[0] == 0 and starts[-1] == length - 32
    for i, start in enumerate(starts):
        assert abs(start - i / (count - 1) * (length - 32)) <= 0.5


def test_a_video_too_short_for_different_clips_and_a_single_clip():
    assert start_frames(20, 32, 10) == [0] * 10
    assert len(set(start_frames(35, 32, 10))) == 4
    assert start_frames(132, 32, 1) == [50]


@pytest.fixture(scope="module")
def folder(ffmpeg, avprep, tmp_path_factory):
    """wide: 10 s, luma rises by the frame, left third dark and right third bright; tall: turned; short: 1 s, no sound;
    long: 64 s."""
    root = tmp_path_factory.mktemp("views")
    sound = ("-f", "lavfi", "-i", "aevalsrc=0.5*sin(2*PI*(200+200*t)*t):s=44100")
    ramp = "nullsrc=s={}:r=16,geq=lum='40+N{}':cb=128:cr=128"
    for name, size, rise, seconds, heard in (("wide", "144x48", "+20*floor(3*X/W)", 10, True),
                                             ("tall", "48x144", "+20*floor(3*Y/H)", 10, True),
                                             ("short", "48x48", "", 1, False), ("long", "64x48", "-N", 64, True)):
        (root / "raw" / "thing").mkdir(parents=True, exist_ok=True)
        ffmpeg("-f", "lavfi", "-i", ramp.format(size, rise), *(sound if heard else ()), "-t", seconds,
               "-c:v", "libx264", "-crf", 4, "-preset", "ultrafast", root / "raw" / "thing" / f"{name}.mp4")
    done = avprep("build", "--dataset", "folder", "--raw", root / "raw", "--out", root, "--crf", 4)
    assert done.returncode == 0, done.stderr
    return open_folders([str(root / "folder" / "train")])


def _clip(folder, name):
    [found] = [clip for clip in folder.rows if name in clip.key]
    return found


def _rows(folder, clip, views, part=None, seed=None, epoch=0):
    return padded(ClipDataset(folder, DATA, seed, views)[clip.place, epoch, part])


def test_clips_are_listed_as_the_shards_have_them(folder):
    everything = folder.rows
    long = [clip for clip in everything if "long" in clip.key]
    assert [clip.frames for clip in sorted(long, key=lambda clip: clip.key)] == [480, 480, 64]
    assert len({clip.video for clip in long}) == 1 and len({clip.video for clip in everything}) == 4
    short = everything.taken(["short" in name for name in everything.keys()])
    assert len(short) == 1 and short.have("visual").all() and short.have("both").all() and not short.have("audio").any()


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_three_crops_lie_left_centre_right_or_top_centre_bottom(folder, name):
    rows = _rows(folder, _clip(folder, name), Views("both", 10, crops=3))
    assert rows.visual.shape == (30, 1, 3, 32, 48, 48) and rows.audio.shape == (30, 1, 1, 80, 128)
    # Stored luma to RGB: (luma - 16) x 255 / 219, the same in each colour.
    first = rows.visual[:, 0, :, 0].float().mean((1, 2, 3)).reshape(3, 10)
    starts = [round(i / 9 * 128) for i in range(10)]
    for crop in range(3):
        expected = [(40 + start + 20 * crop - 16) * 255 / 219 for start in starts]
        np.testing.assert_allclose(first[crop], expected, atol=4)


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_a_centre_of_the_size_of_training_is_pretrainings_fixed_view(folder, name):
    clip = _clip(folder, name)
    rows = _rows(folder, clip, Views("both", 10, whole=False))
    assert rows.visual.shape == (10, 1, 3, 32, DATA.crop, DATA.crop) and DATA.crop < DATA.scale[0]
    assert torch.equal(rows.visual[0, 0], padded(ClipDataset(folder, DATA, None)[clip.place, 0]).visual[0, 0])


def test_sound_of_a_view_starts_with_its_picture(folder):
    clip = _clip(folder, "wide")
    _, members = ShardReader(folder).read(*clip.place)
    stored = np.load(io.BytesIO(members["logmel.npy"])).astype(np.float32)
    rows = _rows(folder, clip, Views("both", 10, sequence=True))
    assert rows.audio.shape == (1, 10, 1, 80, 128) and rows.audio_present.all()
    for i, start in enumerate(start_frames(clip.frames, 32, 10)):
        there = stored[:, 4 * start:4 * start + 128]
        assert np.array_equal(rows.audio[0, i, 0, :, :there.shape[1]].numpy(), there)


def test_what_is_left_out_or_lacking_is_absent(folder):
    wide, short = _clip(folder, "wide"), _clip(folder, "short")
    heard = _rows(folder, wide, Views("audio", 4))
    assert not heard.visual_present.any() and heard.audio_present.all() and heard.visual.numel() == 0
    seen = _rows(folder, wide, Views("visual", 4))
    assert seen.visual_present.all() and not seen.audio_present.any() and not seen.audio.any()
    silent = _rows(folder, short, Views("both", 4))
    assert silent.visual_present.all() and not silent.audio_present.any() and not silent.audio.any()
    assert torch.equal(silent.visual[0, 0, :, 20], silent.visual[0, 0, :, 31])  # the last frame is held
    dataset = ClipDataset(folder, DATA, None, Views("both", 4))
    batch = next(batches(dataset, [[(wide.place, 0), (short.place, 0)]], 0))
    assert batch.visual.shape[0] == 8 and batch.keys == [wide.key] * 4 + [short.key] * 4


def test_training_views_differ_by_epoch_and_part_and_are_the_same_every_time(folder):
    clip = _clip(folder, "wide")
    views = Views("both", 10, sound=SoundAugmentation(frequency_mask=0.3, time_mask=0.3))
    one = _rows(folder, clip, views, 3, 0)
    assert one.visual.shape == (1, 1, 3, 32, 32, 32)
    again = _rows(folder, clip, views, 3, 0)
    assert torch.equal(one.visual, again.visual) and torch.equal(one.audio, again.audio)
    for other in (_rows(folder, clip, views, 3, 0, epoch=1), _rows(folder, clip, views, 3, 1)):
        assert not torch.equal(one.visual, other.visual) and not torch.equal(one.audio, other.audio)
    lumas = [_rows(folder, clip, views, part, 0).visual.float()[0, 0, :, 0].mean() for part in (0, 9)]
    assert lumas[1] - lumas[0] > 100  # 128 frames later


def test_views_for_training_are_heard_as_of_another_recording(folder):
    clip = _clip(folder, "wide")
    plain = Views("audio", 10)
    for sound in (SoundAugmentation(equalizer=1.0), SoundAugmentation(noise=(0.0, 3.0)),
                  SoundAugmentation(frequency_shift=40)):
        views = Views("audio", 10, sound=sound)
        assert not torch.equal(_rows(folder, clip, views, 3, 0).audio, _rows(folder, clip, plain, 3, 0).audio)
        assert torch.equal(_rows(folder, clip, views, 3, None).audio, _rows(folder, clip, plain, 3, None).audio)


def test_random_starts_reach_the_whole_recording(folder):
    clip = _clip(folder, "wide")
    views = Views("visual", 10, random_start=True)
    lumas = [float(_rows(folder, clip, views, None, 0, epoch).visual.float()[0, 0, :, 0].mean())
             for epoch in range(30)]
    starts = [(luma * 219 / 255 + 16 - 60) for luma in lumas]  # within 20 of the frame number, by the crop
    assert min(starts) < 45 and max(starts) > 85
    assert _rows(folder, clip, views, None, 0, 0).visual.shape[:2] == (1, 1)


def test_a_broken_clip_is_named(folder, monkeypatch):
    clip = _clip(folder, "wide")
    monkeypatch.setattr(ShardReader, "read", lambda self, *place: (clip.key, {"mp4": b"broken", "logmel.npy": b""}))
    for batch in (_rows(folder, clip, Views("both", 2)), ClipDataset(folder, DATA, 0)[clip.place, 0]):
        [one] = batch.unreadable
        assert one.key == clip.key and batch.keys == [] and len(batch.visual) == len(batch.audio_present) == 0
