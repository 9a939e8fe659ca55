"""Which segments a clip has: the last one counts from half its length on, and the manifest's row alone tells."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from padded import padded

from avtrain.config import DataConfig
from avtrain.data.clips import ClipDataset
from avtrain.data.presence import presence, segments_in
from avtrain.data.shards import ShardReader, open_folders
from avtrain.data.views import Views

DATA = DataConfig(segment_frames=8, crop=32, scale=(32, 40), workers=0, frequency_mask=0.0, time_mask=0.0)
SEGMENTS = {13: 1, 159: 5, 160: 5, 175: 5, 176: 6, 177: 6}  # of so many frames, at 32 each


@pytest.fixture(scope="module")
def folder(ffmpeg, avprep, tmp_path_factory):
    """Clips of so many frames whose luma rises by the frame, each with sound of the same length; `quiet` has 10 s of
    picture and 3.2 s of sound, `music` 5 s of sound alone."""
    root = tmp_path_factory.mktemp("presence")
    (root / "raw" / "thing").mkdir(parents=True)
    rising = "aevalsrc=0.5*sin(2*PI*(200+100*t)*t):s=44100"
    picture = "nullsrc=s=48x48:r=16,geq=lum='40+N':cb=128:cr=128"
    for name, frames, heard_s in (*((f"of{frames}", frames, frames / 16) for frames in SEGMENTS),
                                  ("quiet", 160, 3.2), ("music", 0, 5)):
        seen = ("-f", "lavfi", "-t", frames / 16, "-i", picture) if frames else ()
        ffmpeg(*seen, "-f", "lavfi", "-t", heard_s, "-i", rising, "-c:v", "libx264", "-crf", 4, "-c:a",
               "pcm_s16le", "-preset", "ultrafast", root / "raw" / "thing" / f"{name}.mkv")
    done = avprep("build", "--dataset", "folder", "--raw", root / "raw", "--out", root, "--crf", 4)
    assert done.returncode == 0, done.stderr
    return open_folders([str(root / "folder" / "train")])


def _row(folder, name):
    [found] = [row for row in folder.rows if name in row.key]
    return found


@pytest.mark.parametrize(("length", "counts"), [(32, {0: 0, 1: 1, 15: 1, 47: 1, 48: 2, 64: 2, 79: 2, 80: 3}),
                                                (31, {46: 1, 47: 2, 77: 2, 78: 3}), (1, {1: 1, 2: 2})])
def test_a_segment_counts_from_half_its_length_on(length, counts):
    assert {frames: segments_in(frames, length) for frames in counts} == counts


@pytest.mark.parametrize("frames", SEGMENTS)
@pytest.mark.parametrize("seed", [None, 0])
def test_picture_and_sound_count_alike(folder, frames, seed):
    row = _row(folder, f"of{frames}")
    assert row.frames == frames
    clip = padded(ClipDataset(folder, DATA, seed)[row.place, 0])
    expected = torch.arange(15) < SEGMENTS[frames]
    assert torch.equal(clip.visual_present[0], expected) and torch.equal(clip.audio_present[0], expected)
    assert clip.visual[0, :SEGMENTS[frames]].float().mean((1, 2, 3, 4)).min() > 0  # nowhere left black
    assert not clip.visual[0, SEGMENTS[frames]:].any() and not clip.audio[0, SEGMENTS[frames]:].any()


@pytest.mark.parametrize("frames", [159, 176])
def test_the_last_frame_is_held_and_sound_is_filled_with_zeros(folder, frames):
    row = _row(folder, f"of{frames}")
    clip = padded(ClipDataset(folder, DATA, None)[row.place, 0])
    last, rest = SEGMENTS[frames] - 1, frames % 32 or 32
    lumas = clip.visual[0, last].float().mean((0, 2, 3)) * 219 / 255 + 16 - 40
    np.testing.assert_allclose(lumas, 32 * last + np.minimum(np.arange(0, 32, 4), (rest - 1) // 4 * 4), atol=2)
    heard = row.mel_frames - 128 * last
    assert 64 <= heard < 128
    assert clip.audio[0, last, 0, :, :heard].any(0).all() and not clip.audio[0, last, 0, :, heard:].any()


@pytest.mark.parametrize("modality", ["both", "visual", "audio"])
@pytest.mark.parametrize("segments", [2, 3, 15])
def test_what_is_there_follows_from_the_row_alone(folder, modality, segments):
    """Nothing is decoded for it, and it is what decoding then gives, wherever the part that is taken begins."""
    data = replace(DATA, modality=modality, segments=segments)
    for row in folder.rows:
        known = presence(row, data, 32)
        assert known.shape == (2, segments)
        for seed, epoch in ((None, 0), (0, 0), (0, 1), (0, 2)):
            clip = padded(ClipDataset(folder, data, seed)[row.place, epoch])
            assert np.array_equal(torch.cat((clip.visual_present, clip.audio_present)), known), (row.key, seed, epoch)
            assert not clip.audio[~clip.audio_present].any() and not clip.visual[:, ~known[0]].any()


def test_the_part_that_is_taken_begins_anywhere_where_both_are(folder):
    def first_lumas(name, segments):
        row, data = _row(folder, name), replace(DATA, segments=segments)
        dataset = ClipDataset(folder, data, 0)
        found = (padded(dataset[row.place, epoch]).visual[0, 0, :, 0].float().mean() for epoch in range(24))
        return {round((float(luma) * 219 / 255 + 16 - 40) / 32) for luma in found}

    assert first_lumas("of160", 3) == {0, 1, 2}
    assert first_lumas("quiet", 2) == {0}  # two segments of sound
    assert first_lumas("quiet", 1) == {0, 1}


def test_what_is_heard_is_of_the_time_that_is_seen(folder):
    """Wherever the part of a longer clip begins that training takes."""
    row, data, firsts = _row(folder, "of160"), replace(DATA, segments=2), set()
    stored = np.load(io.BytesIO(ShardReader(folder).read(*row.place)[1]["logmel.npy"])).astype(np.float32)
    parts = [stored[:, 128 * number:128 * (number + 1)] for number in range(5)]
    for epoch in range(24):
        clip = ClipDataset(folder, data, 0)[row.place, epoch]
        for visual, audio in zip(clip.visual, clip.audio[:, 0].numpy(), strict=True):
            first = round((float(visual[:, 0].float().mean()) * 219 / 255 + 16 - 40) / 32)
            assert [np.array_equal(audio, part) for part in parts] == [number == first for number in range(5)]
            firsts.add(first)
    assert firsts == set(range(5))


def test_sound_that_ends_before_its_picture_is_absent_from_later_views(folder):
    row = _row(folder, "quiet")
    clip = ClipDataset(folder, DATA, None, Views("both", 5, sequence=True))[row.place, 0]
    assert clip.visual_present.tolist() == [[True] * 5]
    assert clip.audio_present.tolist() == [[True, True, False, False, False]] and len(clip.audio) == 2
