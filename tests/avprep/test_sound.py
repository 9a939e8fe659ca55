"""What is stored of sound: the mean of the channels, finite numbers, and marks for what is odd."""

import json

import numpy as np
import pytest
from clock import picture, read, sound

H264 = ["-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p"]
BEEPS = "0.5*sin(2*PI*700*t)*lt(mod(t,1),0.5)"


@pytest.fixture
def built(avprep, tmp_path):
    """Build tmp_path/raw: (clips by source, lines of failures.jsonl)."""

    def build(*options):
        done = avprep("build", "--dataset", "folder", "--raw", tmp_path / "raw", "--out", tmp_path / "out", *options)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "out/folder/train/failures.jsonl").read_text().splitlines()
        clips = read(tmp_path / "out/folder/train")
        return {clip.info["source"]: clip for clip in clips}, [json.loads(line) for line in lines]

    (tmp_path / "raw").mkdir()
    return build


def _channels(ffmpeg, path, *expressions, options=()):
    """A recording of 3 s with these expressions as its channels."""
    layout = {1: "mono", 2: "stereo", 3: "2.1", 4: "quad", 6: "5.1", 8: "7.1"}[len(expressions)]
    ffmpeg("-f", "lavfi", "-i", f"aevalsrc={'|'.join(f'{one!r}' for one in expressions)}:s=48000:c={layout}:d=3",
           *options, path)


def test_the_mix_is_the_mean_of_the_channels(ffmpeg, built, tmp_path):
    raw = tmp_path / "raw"
    for count in (1, 2, 3, 4, 6, 8):
        _channels(ffmpeg, raw / f"all_{count}.flac", *[BEEPS] * count)
        _channels(ffmpeg, raw / f"first_{count}.flac", BEEPS, *["0"] * (count - 1))
    _channels(ffmpeg, raw / "centre.flac", "0", "0", BEEPS, "0", "0", "0")
    _channels(ffmpeg, raw / "bass.flac", "0", "0", "0", BEEPS, "0", "0")  # ffmpeg's own mix leaves it out
    _channels(ffmpeg, raw / "video.mkv", BEEPS, "0", options=[*picture(3), "-map", 0, "-map", 1, *H264, "-c:a", "flac"])
    clips, failures = built()
    assert not failures
    mono = clips["all_1.flac"].log_mel
    loud = mono > 0
    shares = {f"all_{count}.flac": 1.0 for count in (2, 3, 4, 6, 8)}
    shares |= {f"first_{count}.flac": 1 / count for count in (1, 2, 3, 4, 6, 8)}
    shares |= {"centre.flac": 1 / 6, "bass.flac": 1 / 6, "video.mkv": 1 / 2}
    for name, share in shares.items():
        difference = clips[name].log_mel[:, :mono.shape[1]] - mono
        assert np.abs(difference[loud] - 2 * np.log(share)).max() < 0.02, name


def test_channels_that_change_keep_the_level(ffmpeg, built, tmp_path):
    content = b""
    for number, count in enumerate((1, 2, 6)):
        piece = tmp_path / f"{number}.ts"
        _channels(ffmpeg, piece, *[BEEPS] * count, options=["-c:a", "mp2" if count < 3 else "ac3", "-b:a", "384k",
                                                            "-output_ts_offset", 1 + 3 * number])
        content += piece.read_bytes() if count < 3 else b""
    (tmp_path / "raw/x.ts").write_bytes(content)
    log_mel = built()[0]["x.ts"].log_mel.max(0)
    first, second = log_mel[10:180], log_mel[210:370]
    assert abs(np.percentile(first, 90) - np.percentile(second, 90)) < 0.1


def test_samples_over_one_are_kept(ffmpeg, built, tmp_path):
    for name, gain in (("one", 1), ("four", 4)):
        _channels(ffmpeg, tmp_path / "raw" / f"{name}.wav", f"{gain}*{BEEPS}", options=["-c:a", "pcm_f32le"])
    clips, _ = built()
    one, four = clips["one.wav"].log_mel, clips["four.wav"].log_mel
    assert np.abs((four - one)[one > 0] - 2 * np.log(4)).max() < 0.02


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # of 1e30, which is refused
@pytest.mark.parametrize("kind", ["<f4", "<f8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_nothing_that_is_not_finite_is_stored(ffmpeg, built, tmp_path, kind, value):
    """One sample in the second clip of a recording: the first clip stays, the second is a line of the account."""
    samples = np.sin(np.arange(35 * 16_000) * 0.3).astype(kind) * 0.3
    samples[33 * 16_000] = value
    for number, path in enumerate(("raw/a.mkv", "raw/b.wav")):
        bare = tmp_path / "bare.raw"
        bare.write_bytes(samples.tobytes())
        form = {"<f4": "f32le", "<f8": "f64le"}[kind]
        ffmpeg("-f", form, "-ar", 16_000, "-ac", 1, "-i", bare, *(picture(35) if number == 0 else []), *H264, "-c:a",
               f"pcm_{form}", tmp_path / path)
    clips, failures = built()
    assert {name: clip.info["start_s"] for name, clip in clips.items()} == {"a.mkv": 0, "b.wav": 0}
    assert {(line["path"], line["reason"], line["clips_written"]) for line in failures} == {
        ("a.mkv", "values that are not finite", 1), ("b.wav", "values that are not finite", 1)}
    assert all(np.isfinite(clip.log_mel).all() for clip in clips.values())


def test_silence_and_what_cancels_are_marked(ffmpeg, built, tmp_path):
    raw = tmp_path / "raw"
    _channels(ffmpeg, raw / "beeps.flac", BEEPS)
    _channels(ffmpeg, raw / "one_side.flac", BEEPS, "0")
    _channels(ffmpeg, raw / "silent.flac", "0", "0")
    _channels(ffmpeg, raw / "opposite.flac", BEEPS, f"-{BEEPS}")
    _channels(ffmpeg, raw / "lossy.mp3", BEEPS, f"-{BEEPS}", options=["-b:a", "320k"])
    _channels(ffmpeg, raw / "opposite_rear.flac", "0", "0", BEEPS, f"-{BEEPS}")
    clips, failures = built()
    assert not failures
    assert {name: clip.info["marks"] for name, clip in clips.items()} == {
        "beeps.flac": [], "one_side.flac": [], "silent.flac": ["silent"], "opposite.flac": ["cancels"],
        "lossy.mp3": ["cancels"], "opposite_rear.flac": ["cancels"]}


def test_hdr_is_marked(ffmpeg, built, tmp_path):
    for transfer in ("bt709", "smpte2084", "arib-std-b67"):
        ffmpeg(*picture(3), *sound(3), *H264, "-color_trc", transfer, "-color_primaries", "bt2020", "-colorspace",
               "bt2020nc", tmp_path / "raw" / f"{transfer}.mp4")
    clips, _ = built()
    assert {name: clip.info["marks"] for name, clip in clips.items()} == {
        "bt709.mp4": [], "smpte2084.mp4": ["hdr"], "arib-std-b67.mp4": ["hdr"]}
