"""`avprep verify --against`: right clips are found right, and every kind of fault is named."""

import hashlib
import io
import json
import shutil
import tarfile

import numpy as np
import pytest

from avprep import manifest
from avprep.inspect import against
from avprep.shards import read_samples

SILENCE = np.log(1e-6)
HALF_A_SECOND = 32  # log-mel frames
# Two unlike channels, never the same for two seconds.
SOUND = ("aevalsrc='0.4*sin(2*PI*(500+40*floor(4*t))*t)*lt(mod(t,0.25),0.2)|0.2*sin(2*PI*(900+30*floor(3*t))*t)'"
         ":s=48000:d={seconds}")
ENCODED = ("-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p", "-c:a", "aac")
SEGMENTS = ("-g", 32, "-keyint_min", 32, "-sc_threshold", 0, "-flags", "+cgop")


def _picture(seconds, name="testsrc2", more=""):
    return "-f", "lavfi", "-i", f"{name}=size=160x120:rate=25:duration={seconds}{more}"


def _sound(seconds):
    return "-f", "lavfi", "-i", SOUND.format(seconds=seconds)


@pytest.fixture(scope="module")
def raw(ffmpeg, tmp_path_factory):
    """Small files of several kinds."""
    folder = tmp_path_factory.mktemp("against") / "raw"
    folder.mkdir()
    ffmpeg(*_picture(40), *_sound(40), *ENCODED, "-g", 10_000, folder / "long.ts")
    ffmpeg(*_picture(12), *_sound(12), *ENCODED, folder / "stereo.mp4")
    ffmpeg("-itsoffset", 2.5, *_picture(6), *_sound(8), *ENCODED, folder / "late.mkv")
    ffmpeg(*_picture(8), *ENCODED, folder / "mute.mp4")
    ffmpeg(*_picture(8, more=",negate,hflip"), *ENCODED, folder / "unlike.mp4")
    ffmpeg(*_picture(8), *_sound(8), *ENCODED, folder / "cut.mp4")
    ffmpeg(*_picture(8, "smptebars"), *_sound(8), *ENCODED, folder / "still.mp4")
    ffmpeg(*_sound(8), folder / "sound.flac")
    nine = "|".join(f"0.2*sin(2*PI*({300 + 200 * channel}+30*floor(3*t))*t)" for channel in range(9))
    ffmpeg("-f", "lavfi", "-i", f"aevalsrc='{nine}':s=32000:d=5", folder / "nine.wav")
    ffmpeg(*_sound(4), folder / "gone.flac")
    ffmpeg(*_picture(4), *ENCODED, folder / "text.mp4")
    ffmpeg(*_sound(4), folder / "nothing.flac")
    return folder


@pytest.fixture(scope="module")
def shards(raw, avprep):
    """The folder with their index."""
    done = avprep("build", "--dataset", "folder", "--raw", raw, "--out", raw.parent / "out", "--shard-mb", 0.1,
                  "--frames", 256)
    assert done.returncode == 0 and "0 failed" in done.stdout, done.stderr + done.stdout
    return raw.parent / "out" / "folder" / "train"


def _members(shards):
    index = json.loads((shards / "index.json").read_text())
    return {sample.key: sample.members for entry in index["shardlist"]
            for sample in read_samples(shards / entry["url"])}


def _rewrite(shards, changed):
    """Put other members into the shards; the index knows of it."""
    index, rows = json.loads((shards / "index.json").read_text()), []
    for entry in index["shardlist"]:
        path = shards / entry["url"]
        samples = {sample.key: {**sample.members, **changed.get(sample.key, {})} for sample in read_samples(path)}
        with tarfile.open(path, "w") as tar:
            for key, members in samples.items():
                for ending, content in members.items():
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        entry["filesize"] = path.stat().st_size
        rows += [manifest.clip_row(json.loads(sample.members["json"]), path.name, sample.places)
                 for sample in read_samples(path)]
    content = manifest.parquet_of(manifest.table_of(rows, manifest.CLIPS_SCHEMA))
    (shards / manifest.CLIPS).write_bytes(content)
    index["manifest"] = [manifest.entry_of(manifest.CLIPS, content, len(rows)), index["manifest"][1]]
    (shards / "index.json").write_text(json.dumps(index))


def _npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array.astype(np.float16))
    return buffer.getvalue()


def _spectrogram(members):
    return np.load(io.BytesIO(members["logmel.npy"])).astype(np.float32)


def test_right_clips_are_found_right(raw, shards, avprep):
    done = avprep("verify", shards, "--against", raw, "--clips", "all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"{shards}/index.json: checked",
                                        f"{shards}/index.json: 14 clips compared with their sources"]
    assert json.loads(_members(shards)["late-0000"]["json"])["marks"] == ["held_frames"]


def test_every_kind_of_fault_is_named(ffmpeg, raw, shards, avprep, tmp_path):
    changed_raw, changed_shards = tmp_path / "raw", tmp_path / "shards"
    shutil.copytree(raw, changed_raw)
    shutil.copytree(shards, changed_shards)
    (changed_raw / "gone.flac").unlink()
    (changed_raw / "text.mp4").write_text("this is no video\n" * 100)
    (changed_raw / "nothing.flac").write_text("this is no sound\n" * 100)  # its name is enough for libav to open it
    ffmpeg("-ss", 1, *_picture(13), "-r", 16, "-frames:v", 192, *ENCODED, *SEGMENTS, tmp_path / "later.mp4")
    was = _members(shards)
    info = json.loads(was["cut-0000"]["json"])
    (tmp_path / "stored.mp4").write_bytes(was["cut-0000"]["mp4"])
    ffmpeg("-i", tmp_path / "stored.mp4", "-frames:v", 96, *ENCODED, *SEGMENTS, tmp_path / "cut.mp4")
    half_silent, gap = _spectrogram(was["long-0002"]), _spectrogram(was["sound-0000"])
    half_silent[:, half_silent.shape[1] // 2:] = SILENCE
    gap[:, 128:256] = SILENCE
    _rewrite(changed_shards, {
        "long-0000": {"logmel.npy": _npy(np.roll(_spectrogram(was["long-0000"]), HALF_A_SECOND, axis=1))},
        "long-0001": {"logmel.npy": _npy(_spectrogram(was["long-0001"]) + 0.69)},
        "long-0002": {"logmel.npy": _npy(half_silent)},
        "sound-0000": {"logmel.npy": _npy(gap)},
        "stereo-0000": {"mp4": (tmp_path / "later.mp4").read_bytes()},
        "mute-0000": {"mp4": was["unlike-0000"]["mp4"]},
        "unlike-0000": {"mp4": was["mute-0000"]["mp4"]},
        "cut-0000": {"mp4": (tmp_path / "cut.mp4").read_bytes(),
                     "json": json.dumps({**info, "frames": 96}).encode()}})
    done = avprep("verify", changed_shards)
    assert done.returncode == 0, done.stdout  # nothing but the sources can tell

    done = avprep("verify", changed_shards, "--against", changed_raw, "--clips", 0)
    assert done.returncode == 1 and "11 problem(s): clips differ from their sources" in done.stderr
    assert "Traceback" not in done.stderr
    lines = [line.removeprefix(f"{changed_shards}/").partition(": ")[2] for line in done.stdout.splitlines()]
    lines = [line.replace(": neither picture nor sound", "") for line in lines]
    assert sorted(line for line in lines if ", source " in line) == [
        "cut-0000: it has 6.00 s of picture where its source has 8.00 s, source cut.mp4",
        f"gone-0000: its source is not in {changed_raw}, source gone.flac",
        "long-0000: its sound from 4.0 s on is that of 0.50 s earlier, source long.ts",
        "long-0001: its sound from 0.0 s on is +0.69 in log-mel against the mean of its source's channels, "
        "source long.ts",
        "long-0002: its sound from 4.0 s on is silent where its source is not, source long.ts",
        "mute-0000: its picture at 0.0 s is none of those within 3 s there, source mute.mp4",
        "nothing-0000: its source can't be decoded, source nothing.flac",
            "sound-0000: its sound from 0.0 s on is none of that within 1.5 s there, source sound.flac",
        "stereo-0000: its picture at 0.0 s is that of 1.00 s later, source stereo.mp4",
        "text-0000: its source can't be decoded: Invalid data found when processing input, source text.mp4",
        "unlike-0000: its picture at 0.0 s is none of those within 3 s there, source unlike.mp4"]


def test_sample_is_spread_over_the_shards(shards):
    some = against.sample(shards / "index.json", 4)
    assert some == against.sample(shards / "index.json", 4) and len(some) == 4
    assert len({clip.shard for clip in some}) >= 3
    every = against.sample(shards / "index.json", 0)
    assert len(every) == len(set(clip.key for clip in every)) == 14
    assert against.sample(shards / "index.json", 99) == every


def test_a_file_that_crashes_the_decoder_costs_its_own_clips(raw, shards, tmp_path, monkeypatch):
    (tmp_path / "crashing.py").write_text(
        "import os\n\ndef problems(path, clips):\n    if path.name == 'mute.mp4':\n        os.abort()\n"
        "    return [[]] * len(clips)\n")
    monkeypatch.syspath_prepend(tmp_path)
    import crashing

    monkeypatch.setattr(against, "_problems_of_source", crashing.problems)
    assert [line.partition(": ")[2] for line in against.differences(against.sample(shards / "index.json", 0), raw)] == [
        "mute-0000: its source crashes the decoder, source mute.mp4"]


def test_a_source_is_looked_for_in_its_folder_only(raw, shards, tmp_path):
    for clip in against.sample(shards / "index.json", 1):
        for name in (str(raw / clip.source), f"../raw/{clip.source}"):
            assert against._path_of(against.StoredClip(**{**vars(clip), "source": name}), raw) is None
        assert against._path_of(clip, raw) == raw / clip.source


@pytest.mark.parametrize(("arguments", "expected"), [
    (("--against", "nowhere"), "nowhere is not a folder"),
    (("--against", "empty"), "empty has none of the sources, such as"),
    (("--against", "empty", "--clips", "many"), "--clips is many: it must be a number of clips, or all"),
    (("--against", "empty", "--clips", "-1"), "--clips is -1"),
    (("--clips", "3"), "--against RAW"),
])
def test_mistakes_are_answered_in_a_line(shards, avprep, tmp_path, arguments, expected):
    (tmp_path / "empty").mkdir()
    done = avprep("verify", shards, *arguments, cwd=tmp_path)
    assert done.returncode == 1 and expected in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
