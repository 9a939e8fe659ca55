"""Picture and sound start at the same instant, whatever the file's time stamps: a flash and a click at one moment."""

import io
import json

import av
import numpy as np
import pytest

from avprep.shards import read_samples

EVENT_S = 3.0
MEL_FRAME_S = 690 / 44_100


def _flash_and_click(ffmpeg, path, fps, video_starts_s, audio_starts_s, variable=False):
    """6 s of black and silence with a flash and a click at EVENT_S on the common time line."""
    flash_s = EVENT_S - video_starts_s
    flash = f"drawbox=color=white:t=fill:enable='between(t,{flash_s},{flash_s + 0.4})'"
    drop = ",select='not(eq(mod(n,7),2)+eq(mod(n,5),1))'" if variable else ""
    click_s = EVENT_S - audio_starts_s
    ffmpeg("-itsoffset", video_starts_s, "-f", "lavfi", "-i", f"color=black:s=160x120:r={fps}:d=6,{flash}{drop}",
           "-itsoffset", audio_starts_s, "-f", "lavfi",
           "-i", f"aevalsrc='if(between(t,{click_s},{click_s + 0.2}),0.9*sin(2*PI*1000*t),0)':s=48000:d=6",
           "-map", "0:v", "-map", "1:a", "-c:v", "libx264", "-preset", "ultrafast",
           "-fps_mode", "vfr" if variable else "passthrough", "-c:a", "pcm_s16le", path)


RATES = ["10", "30000/1001", "vfr"]
MORE_RATES = ["24000/1001", "25", "30", "50"]
STARTS_S = [(0, 0), (0.5, 0), (0, 0.7), (1.3, 0.9)]


def _name(fps, starts_s):
    return f"{fps.replace('/', '_')}-{starts_s[0]}-{starts_s[1]}".replace(".", "_")


def _events_s(ffmpeg, avprep, root, rates):
    """When the flash and the click come in each clip, by the video's name."""
    raw = root / "raw"
    raw.mkdir()
    for fps in rates:
        for starts_s in STARTS_S:
            variable = fps == "vfr"
            path = raw / f"{_name(fps, starts_s)}.mkv"
            _flash_and_click(ffmpeg, path, "30" if variable else fps, *starts_s, variable)
    done = avprep("build", "--dataset", "folder", "--raw", raw, "--out", root)
    assert done.returncode == 0, done.stderr
    found = {}
    for sample in read_samples(root / "folder" / "train" / "train-000000.tar"):
        members = sample.members
        info = json.loads(members["json"])
        with av.open(io.BytesIO(members["mp4"])) as container:
            bright = [frame.to_ndarray(format="gray").mean() > 128 for frame in container.decode(video=0)]
        spectrogram = np.load(io.BytesIO(members["logmel.npy"])).astype(np.float32)
        segment, frame = divmod(int(np.where(spectrogram.max(axis=0) > 0)[0][0]), 128)
        found[info["source"].removesuffix(".mkv")] = bright.index(True) / 16, segment * 2 + frame * MEL_FRAME_S
    return found


@pytest.fixture(scope="module")
def events_s(ffmpeg, avprep, tmp_path_factory):
    return _events_s(ffmpeg, avprep, tmp_path_factory.mktemp("flashes"), RATES)


@pytest.fixture(scope="module")
def more_events_s(ffmpeg, avprep, tmp_path_factory):
    return _events_s(ffmpeg, avprep, tmp_path_factory.mktemp("flashes"), MORE_RATES)


def _assert_together(events_s, fps, starts_s):
    flash_s, click_s = events_s[_name(fps, starts_s)]
    assert abs(flash_s - click_s) <= 1 / 16
    # A source slower than 16 fps can show the flash no earlier than its own next frame.
    assert abs(flash_s - (EVENT_S - min(starts_s))) <= (1 / 10 if fps == "10" else 1 / 16)


@pytest.mark.parametrize("fps", RATES)
@pytest.mark.parametrize("starts_s", STARTS_S)
def test_flash_and_click(events_s, fps, starts_s):
    _assert_together(events_s, fps, starts_s)


@pytest.mark.slow
@pytest.mark.parametrize("fps", MORE_RATES)
@pytest.mark.parametrize("starts_s", STARTS_S)
def test_flash_and_click_at_more_rates(more_events_s, fps, starts_s):
    _assert_together(more_events_s, fps, starts_s)


def test_second_window_is_aligned_too(ffmpeg, avprep, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    _flash_and_click(ffmpeg, raw / "x.mkv", "30000/1001", 0.5, 0.0)
    done = avprep("build", "--dataset", "folder", "--raw", raw, "--out", tmp_path, "--frames", 32)
    assert done.returncode == 0, done.stderr
    found = {}
    for sample in read_samples(tmp_path / "folder" / "train" / "train-000000.tar"):
        key, members = sample.key, sample.members
        with av.open(io.BytesIO(members["mp4"])) as container:
            bright = [frame.to_ndarray(format="gray").mean() > 128 for frame in container.decode(video=0)]
        loud = np.load(io.BytesIO(members["logmel.npy"])).astype(np.float32).max(axis=0) > 0
        found[key] = (bright, loud)
    assert sorted(found) == ["x-0000", "x-0001", "x-0002"]
    assert not any(found["x-0000"][0]) and not found["x-0000"][1].any()
    bright, loud = found["x-0001"]  # 2 s to 4 s: the event comes in its middle
    assert abs(bright.index(True) / 16 - 1.0) <= 1 / 16
    assert abs(np.where(loud)[0][0] * MEL_FRAME_S - 1.0) <= 1 / 16
