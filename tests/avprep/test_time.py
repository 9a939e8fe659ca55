"""Stored pictures and sound are those of the time that the clip claims: streams that change, seeking, wrong lengths."""

import json
import struct

import numpy as np
import pyarrow.parquet as pq
import pytest
from clock import PICTURE, SOUND, picture, read, sound, source

H264 = ["-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p"]
AAC = ["-c:a", "aac", "-b:a", "96k"]
TS = ["-muxdelay", 0, "-muxpreload", 0, "-f", "mpegts"]


def _first_quick(first, *others):
    """Parameters of a test, of which the others are for `make test-slow`."""
    return [*first, *(pytest.param(*other, marks=pytest.mark.slow) for other in others)]


@pytest.fixture
def built(avprep, tmp_path):
    """Build tmp_path/raw and read it back."""

    def build(*options):
        done = avprep("build", "--dataset", "folder", "--raw", tmp_path / "raw", "--out", tmp_path / "out", *options)
        assert done.returncode == 0, done.stderr
        failures = [json.loads(line) for line in
                    (tmp_path / "out/folder/train/failures.jsonl").read_text().splitlines()]
        return read(tmp_path / "out/folder/train"), failures

    (tmp_path / "raw").mkdir()
    return build


@pytest.fixture(scope="module")
def master(ffmpeg, tmp_path_factory):
    """50 s of both, nearly lossless, with a keyframe every half second."""
    path = tmp_path_factory.mktemp("master") / "master.mkv"
    ffmpeg(*source(50), *H264, "-crf", 5, "-g", 10, "-c:a", "pcm_s16le", path)
    return path


def _spliced(ffmpeg, master, parts, out, clock_runs_on=True):
    """Parts of 4 s, each with its own options, byte after byte in one transport stream."""
    content = b""
    for number, options in enumerate(parts):
        piece = out.parents[1] / f"{number}.ts"
        ffmpeg("-ss", 4 * number, "-t", 4, "-i", master, *H264, "-g", 20, *AAC, *options,
               "-output_ts_offset", 1 + (4 * number if clock_runs_on else 0), *TS, piece)
        content += piece.read_bytes()
    out.write_bytes(content)


CHANGES = {
    "channels": [["-ac", 1], ["-ac", 2]],
    "channels_back_and_forth": [["-ac", 2], ["-ac", 1], ["-ac", 6], ["-ac", 2]],
    "rate": [["-ar", 48_000], ["-ar", 44_100], ["-ar", 32_000]],
    "size": [["-s", "64x48"], ["-s", "128x96"], ["-s", "32x24"]],
    "shape": [["-s", "64x48"], ["-s", "64x36"]],
    "all": [["-ac", 1, "-s", "64x48"], ["-ac", 2, "-ar", 44_100, "-s", "128x96"]],
}


@pytest.mark.parametrize("parts", _first_quick(
    [CHANGES["channels_back_and_forth"], CHANGES["all"]],
    *((CHANGES[name],) for name in ("channels", "rate", "size", "shape"))))
def test_a_stream_that_changes_in_the_middle(ffmpeg, master, built, tmp_path, parts):
    _spliced(ffmpeg, master, parts, tmp_path / "raw/x.ts")
    [clip], failures = built()
    assert not failures
    clip.assert_in_step(0, 4 * len(parts), 4 * len(parts), within_s=0.12)


@pytest.mark.parametrize("parts", _first_quick([CHANGES["channels"]], ([["-ac", 1]] * 4,)))
def test_a_clock_that_begins_anew(ffmpeg, master, built, tmp_path, parts):
    """Recordings that were put together: the times of the second are those of the first."""
    _spliced(ffmpeg, master, parts, tmp_path / "raw/x.ts", clock_runs_on=False)
    [clip], failures = built()
    assert not failures
    clip.assert_in_step(0, 4 * len(parts), 4 * len(parts), within_s=0.15)


def test_no_seeking_by_a_clock_that_begins_anew(ffmpeg, master, built, tmp_path):
    """The second clip begins at 8 s, a time that the first recording does not have and the second not either."""
    _spliced(ffmpeg, master, [[]] * 4, tmp_path / "raw/x.ts", clock_runs_on=False)
    first, second = built("--frames", 128)[0]
    first.assert_in_step(0, 8, 8, within_s=0.15)
    second.assert_in_step(8, 8, 8, within_s=0.15)


@pytest.mark.parametrize(("option", "name"), [("-af", "aselect"), ("-vf", "select")], ids=["sound", "picture"])
def test_a_stream_that_pauses_is_no_new_clock(ffmpeg, master, built, tmp_path, option, name):
    """One stream of a transport stream is silent for 13 s; the other goes on, and neither moves."""
    ffmpeg("-t", 20, "-i", master, option, f"{name}='lt(t,3)+gte(t,16)'", *H264, *AAC, "-fps_mode", "passthrough",
           tmp_path / "raw/x.ts")
    [clip], failures = built()
    assert not failures and abs(clip.info["frames"] / 16 - 20) < 0.15 and abs(clip.info["sound_s"] - 20) < 0.15
    heard = [(round(at_s), tone) for at_s, tone in clip.beeps]
    assert heard == [(second, second % 10) for second in range(20) if name == "select" or not 3 <= second < 16]
    seen = np.arange(clip.info["frames"]) / 16
    shows = (seen < 2.9) | (seen > 16.1) | (name == "aselect")
    assert np.abs(np.array(clip.frames_s) + 0.05 - seen)[shows].max() <= 0.2


@pytest.mark.parametrize("option", [["-af", "aselect='lt(t,3)+gt(t,6.5)'"], ["-vf", "select='lt(t,3)+gt(t,6.5)'"]],
                         ids=["sound", "picture"])
def test_a_pause_before_the_clock_begins_anew(ffmpeg, master, built, tmp_path, option):
    """What tells a new clock must not take a pause of 3 s in one stream for one, whichever comes first."""
    content = b""
    for number, more in enumerate((option, [])):
        piece = tmp_path / f"{number}.ts"
        ffmpeg("-ss", 20 * number, "-t", 20, "-i", master, *H264, "-g", 20, *AAC, *more, "-fps_mode", "passthrough",
               *TS, piece)
        content += piece.read_bytes()
    (tmp_path / "raw/x.ts").write_bytes(content)
    first, second = built()[0]
    heard = [(round(at_s), tone) for at_s, tone in first.beeps]
    assert heard == [(second, second % 10) for second in range(30) if "-vf" in option or not 3 <= second <= 6]
    wrong_by_s = np.abs(np.array(first.frames_s) + 0.05 - np.arange(480) / 16)
    assert wrong_by_s[:45].max() <= 0.2 and wrong_by_s[108:].max() <= 0.2
    second.assert_in_step(30, 10, 10, within_s=0.15)


@pytest.mark.parametrize("kind", ["mp4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("mkv", "ts"))])
def test_a_clip_that_begins_in_a_pause_of_the_pictures(ffmpeg, master, built, tmp_path, kind):
    """What is shown is the last picture before the clip, as in the source, until the next; never one of the future."""
    ffmpeg("-i", master, "-vf", "select='lt(t,12)+gt(t,35)'", "-fps_mode", "vfr", *H264, *AAC,
           tmp_path / f"raw/x.{kind}")
    clips = built("--frames", 320)[0]
    shown = np.concatenate([clip.frames_s for clip in clips])[:50 * 16]
    right = np.arange(len(shown)) / 16
    right[(right >= 12) & (right <= 35)] = 11.9
    assert np.abs(shown + 0.05 - right).max() <= 0.2 and len(clips) == 3
    assert all("held_frames" not in clip.info["marks"] for clip in clips)


@pytest.mark.parametrize(("kind", "ends_s"), [
    ("ts", 20.03), pytest.param("mp4", 6, marks=pytest.mark.slow), *(
        pytest.param(kind, ends_s, marks=pytest.mark.slow)
        for kind in ("mp4", "mkv", "ts") for ends_s in (19.5, 20.03, 20.5) if (kind, ends_s) != ("ts", 20.03))])
def test_a_stream_that_ends_before_a_later_clip(ffmpeg, master, built, tmp_path, kind, ends_s):
    """Sound (and in another file the picture) is missing where there is none; what there is stays."""
    for name, streams in (("a", ("1:v", "0:a")), ("v", ("0:v", "1:a"))):
        ffmpeg("-t", ends_s, "-i", master, "-i", master, "-map", streams[0], "-map", streams[1], *H264, *AAC,
               tmp_path / f"raw/{name}.{kind}")
    clips, failures = built("--frames", 320)
    assert not failures and len(clips) == 6
    for clip in clips:
        lacks, start_s = ("sound" if clip.info["source"][0] == "a" else "picture"), clip.info["start_s"]
        other = "frames" if lacks == "sound" else "mel_frames"
        assert clip.info[other] > 100
        if start_s == 40 or ends_s < 20 and start_s == 20:
            assert clip.info["missing"] == [lacks]


def test_sound_that_begins_late_in_a_stream_without_a_list(ffmpeg, master, built, tmp_path):
    """libav looks 5 s far for streams unless it is told to look farther."""
    ffmpeg("-itsoffset", 12, "-i", master, "-i", master, "-t", 30, "-map", "1:v", "-map", "0:a", *H264, *AAC,
           tmp_path / "raw/x.ts")
    [clip], _ = built()
    assert clip.info["missing"] == [] and "filled_silence" in clip.info["marks"] and round(clip.beeps[0][0]) == 12


@pytest.mark.parametrize("codec", _first_quick(["adpcm_ms"], ("adpcm_ima_wav",), ("pcm_alaw",)))
def test_sound_in_blocks_is_not_sought(ffmpeg, built, tmp_path, codec):
    """After seeking in ADPCM, ffmpeg 5.1 gives its time stamps to sound of 3 s later."""
    ffmpeg(*sound(50, 22_050), "-c:a", codec, tmp_path / "raw/x.wav")
    clips = built("--frames", 320)[0]
    for clip, length_s in zip(clips, (20, 20, 10), strict=True):
        clip.assert_in_step(clip.info["start_s"], None, length_s)


def test_bare_sound_that_changes_its_rate_is_refused(ffmpeg, built, tmp_path):
    """Its packets tell no time, and are counted by the first one's rate."""
    content = b""
    for number, rate_hz in enumerate((44_100, 24_000)):
        ffmpeg(*sound(8, rate_hz), "-c:a", "aac", tmp_path / f"{number}.aac")
        content += (tmp_path / f"{number}.aac").read_bytes()
    (tmp_path / "raw/x.aac").write_bytes(content)
    ffmpeg(*sound(4), "-c:a", "aac", tmp_path / "raw/good.aac")
    clips, [failure] = built()
    assert failure["reason"] == "nothing tells the time" and [clip.info["source"] for clip in clips] == ["good.aac"]


# --- seeking: clips of 20 s, so that the later ones begin between keyframes

CONTAINERS = {
    "mp4": [*H264, "-g", 250, *AAC],
    "fragments.mp4": [*H264, "-g", 250, *AAC, "-movflags", "frag_keyframe+empty_moov"],
    "ts": [*H264, "-g", 250, *AAC],
    "one_keyframe.ts": [*H264, "-g", 9999, *AAC],
    "mpg": ["-r", 25, "-c:v", "mpeg2video", "-q:v", 4, "-g", 15, "-bf", 2, "-c:a", "mp2"],
    "mkv": [*H264, "-g", 250, "-bf", 3, *AAC],
    "live.mkv": [*H264, "-g", 250, *AAC, "-live", 1],
    "flv": [*H264, "-g", 250, "-ar", 44_100, *AAC],
    "avi": ["-c:v", "mpeg4", "-q:v", 3, "-g", 250, "-c:a", "mp2"],
    "webm": ["-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", 8, "-b:v", "1M", "-g", 250, "-c:a", "libopus"],
    "mp3": ["-vn", "-c:a", "libmp3lame", "-q:a", 6, "-write_xing", 0],
    "aac": ["-vn", *AAC],
    "ogg": ["-vn", "-c:a", "libvorbis"],
    "opus": ["-vn", "-c:a", "libopus"],
}


FASTEST = ("mp4", "one_keyframe.ts")


@pytest.mark.parametrize("name", [name if name in FASTEST else pytest.param(name, marks=pytest.mark.slow)
                                  for name in CONTAINERS])
def test_every_clip_of_a_long_file_begins_where_it_says(ffmpeg, master, built, tmp_path, name):
    ffmpeg("-i", master, *CONTAINERS[name], tmp_path / "raw" / f"x.{name}")
    clips, failures = built("--frames", 320)
    assert not failures and [clip.info["start_s"] for clip in clips] == [0, 20, 40]
    sees = None if "-vn" in CONTAINERS[name] else 0
    for clip, length_s in zip(clips, (20, 20, 10), strict=True):
        clip.assert_in_step(clip.info["start_s"], sees if sees is None else length_s, length_s)
        assert "held_frames" not in clip.info["marks"]


# --- lengths

def _track_lengths(path, factor):
    """Change what each track of an mp4 states as its length (mdhd, version 0)."""
    data = bytearray(path.read_bytes())
    at = data.find(b"mdhd")
    while at > 0:
        place = at + 20
        struct.pack_into(">I", data, place, round(struct.unpack_from(">I", data, place)[0] * factor))
        at = data.find(b"mdhd", at + 1)
    path.write_bytes(data)


@pytest.mark.parametrize("factor", _first_quick([1 / 30], (0.5,), (30,)))
def test_track_headers_that_state_another_length(ffmpeg, master, built, tmp_path, factor):
    ffmpeg("-t", 40, "-i", master, *H264, *AAC, tmp_path / "raw/x.mp4")
    _track_lengths(tmp_path / "raw/x.mp4", factor)
    clips, failures = built()
    assert not failures
    for clip, start_s, length_s in zip(clips, (0, 30), (30, 10), strict=True):
        clip.assert_in_step(start_s, length_s, length_s)


@pytest.mark.parametrize("kind", _first_quick(["mp3"], ("aac",), ("live.mkv",), ("wav",)))
def test_lengths_that_are_a_guess_or_are_not_there(ffmpeg, built, tmp_path, kind):
    """Silence and then noise at a variable rate: what the first packets say of the rest is wrong."""
    options = {"mp3": ["-c:a", "libmp3lame", "-q:a", 2, "-write_xing", 0], "aac": ["-c:a", "aac", "-q:a", 1.5],
               "live.mkv": ["-c:a", "libopus", "-live", 1], "wav": []}[kind]
    path = tmp_path / "raw" / f"x.{kind}"
    ffmpeg("-f", "lavfi", "-i", "aevalsrc='0.3*(2*random(0)-1)*gte(t,20)':s=48000:d=40", *options, path)
    if kind == "wav":  # as a recorder that was never stopped leaves it
        data = bytearray(path.read_bytes())
        struct.pack_into("<I", data, data.find(b"data") + 4, 0xFFFFFFFF)
        path.write_bytes(data)
    clips, failures = built()
    assert not failures and [round(clip.info["sound_s"]) for clip in clips] == [30, 10]
    loud = np.concatenate([clip.log_mel.max(0) > -5 for clip in clips])
    assert loud.sum() == pytest.approx(len(loud) / 2, abs=10) and loud[len(loud) // 2 + 5:].all()


def _sources(tmp_path):
    return pq.read_table(tmp_path / "out/folder/train/sources.parquet").to_pylist()


def test_what_was_promised_and_what_came_is_in_the_account(ffmpeg, master, built, tmp_path):
    ffmpeg("-t", 40, "-i", master, *H264, *AAC, tmp_path / "raw/wrong.mp4")
    _track_lengths(tmp_path / "raw/wrong.mp4", 1 / 30)
    ffmpeg("-t", 40, "-i", master, *H264, "-g", 20, *AAC, tmp_path / "whole.mkv")
    content = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "raw/cut.mkv").write_bytes(content[:len(content) * 2 // 3])
    clips, [failure] = built()
    assert (failure["path"], failure["reason"]) == ("cut.mkv", "truncated") and "of 40.0 s" in failure["detail"]
    assert failure["clips_written"] >= 1  # what came is kept
    cut = [clip for clip in clips if clip.info["source"] == "cut.mkv"]
    assert sum(clip.info["frames"] for clip in cut) / 16 == pytest.approx(40 * 2 / 3, abs=3)
    remarks = [row for row in _sources(tmp_path) if row["promised_s"] is not None]
    assert [row["name"] for row in remarks] == ["wrong.mp4"]
    assert remarks[0]["promised_s"] == pytest.approx(40 / 30, abs=0.1)
    assert remarks[0]["came_s"] == pytest.approx(40, abs=0.1)


def test_pictures_without_a_time_of_decoding_are_no_new_clock(ffmpeg, built, tmp_path):
    """Matroska states when a picture is shown, not when it is decoded: with B-frames the first have no such time."""
    ffmpeg(*sound(6), "-itsoffset", 0.54, *picture(5), "-map", 0, "-map", 1, "-c:v", "libx264", "-bf", 3, "-c:a",
           "pcm_s16le", tmp_path / "raw/x.mkv")
    [clip], _ = built()
    assert clip.info["frames"] == 89 and abs(clip.info["sound_s"] - 6) < 0.01  # 5.54 and 6 s, not more
    [row] = _sources(tmp_path)
    assert (row["status"], row["promised_s"], row["came_s"]) == ("written", None, None)


@pytest.mark.parametrize(("seconds", "lengths_s"), [(30.9, [30]), (32.5, [30, 2.5]), (1.2, [1.2])])
def test_a_rest_shorter_than_a_segment_is_left_out(ffmpeg, master, built, tmp_path, seconds, lengths_s):
    ffmpeg("-t", seconds, "-i", master, *H264, "-c:a", "pcm_s16le", tmp_path / "raw/x.mkv")
    clips, _ = built()
    assert [clip.info["frames"] / 16 for clip in clips] == pytest.approx(lengths_s, abs=0.1)


# --- streams that begin later

@pytest.mark.parametrize("late_s", [0.04, 0.26, 1.3])
def test_the_very_first_picture_is_held_until_the_next_is_due(ffmpeg, built, tmp_path, late_s):
    """50 pictures a second, each of its own grey: the first one is shown from the start, not one of the next."""
    ffmpeg(*sound(4), "-itsoffset", late_s, "-f", "lavfi", "-t", 2, "-i",
           "color=black:s=64x48:r=50,format=gray,geq=lum='40+4*N',format=yuv420p",
           "-map", 0, "-map", 1, *H264, "-crf", 1, "-c:a", "pcm_s16le", tmp_path / "raw/x.mkv")
    [clip], _ = built("--crf", 1)
    import io
    import tarfile

    import av

    with tarfile.open(tmp_path / "out/folder/train/train-000000.tar") as tar:
        mp4 = tar.extractfile(next(name for name in tar.getnames() if name.endswith(".mp4"))).read()
    with av.open(io.BytesIO(mp4)) as container:
        grey = [(float(frame.to_ndarray(format="yuv420p")[10:30, 10:30].mean()) - 16) * 255 / 219
                for frame in container.decode(video=0)]
    held = max(1, round(late_s * 16))
    assert grey[:held] == pytest.approx([40] * held, abs=1.5)
    # Later, frame k shows what the source shows at k / 16 s, to the nearest.
    shown = (np.array(grey[held:held + 10]) - 40) / 4 / 50 + late_s
    assert np.abs(shown - (held + np.arange(10)) / 16).max() <= 1 / 32 + 1 / 50
    assert ("held_frames" in clip.info["marks"]) == (late_s > 1 / 16)


def test_silence_that_was_put_in_is_marked(ffmpeg, built, tmp_path):
    raw = tmp_path / "raw"
    ffmpeg(*picture(6), "-itsoffset", 2, *sound(4), "-map", 0, "-map", 1, *H264, "-c:a", "flac", raw / "late.mkv")
    gap = "aselect='lt(t,2)+gte(t,4)'"
    ffmpeg(*source(6), "-af", gap, *H264, "-c:a", "flac", raw / "gap.mkv")
    ffmpeg(*source(6), *H264, *AAC, raw / "plain.mp4")
    marks = {clip.info["source"]: clip.info["marks"] for clip in built()[0]}
    assert marks == {"late.mkv": ["filled_silence"], "gap.mkv": ["filled_silence"], "plain.mp4": []}


def test_a_wav_that_was_cut_off_is_in_the_account(ffmpeg, built, tmp_path):
    """libav counts what is there, whatever the header says."""
    ffmpeg(*sound(40), tmp_path / "whole.wav")
    content = (tmp_path / "whole.wav").read_bytes()
    (tmp_path / "raw/cut.wav").write_bytes(content[:len(content) // 4 * 2])  # after a whole sample
    (tmp_path / "raw/whole.wav").write_bytes(content[:-200])  # a little less than it states is no fault
    clips, [failure] = built()
    assert (failure["path"], failure["reason"]) == ("cut.wav", "truncated") and "20.0 of 40.0 s" in failure["detail"]
    assert [(clip.info["source"], round(clip.info["sound_s"])) for clip in clips] == [
        ("cut.wav", 20), ("whole.wav", 30), ("whole.wav", 10)]


@pytest.mark.parametrize("offset_s", [5000, 0.5])
def test_a_clock_that_begins_late_is_no_broken_file(ffmpeg, master, built, tmp_path, offset_s):
    ffmpeg("-t", 6, "-i", master, *H264, *AAC, "-output_ts_offset", offset_s, tmp_path / "raw/x.mkv")
    [clip], failures = built()
    assert not failures
    clip.assert_in_step(0, 6, 6)


def test_a_list_of_other_files_is_no_media_file(ffmpeg, built, tmp_path):
    ffmpeg(*sound(4), tmp_path / "raw/good.wav")
    (tmp_path / "raw/list.mp4").write_text("ffconcat version 1.0\nfile good.wav\n")
    clips, [failure] = built()
    assert (failure["path"], failure["reason"]) == ("list.mp4", "not a readable media file") and len(clips) == 1


def test_material_is_readable():
    """The tests above would pass on anything if nothing could be read of it."""
    assert "floor(T" in PICTURE and "floor(t)" in SOUND
