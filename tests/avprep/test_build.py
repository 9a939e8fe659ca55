"""`avprep build` on files of many kinds: every input accounted for, byte for byte the same however it was run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pyarrow.parquet as pq
import pytest

from avprep.shards import read_samples


def _bytes_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and ".build" not in path.parts}


def _index(folder):
    return json.loads((folder / "index.json").read_text())


def _samples(folder):
    return {sample.key: (json.loads(sample.members["json"]), sample.members) for entry in _index(folder)["shardlist"]
            for sample in read_samples(folder / entry["url"])}


@pytest.fixture(scope="module")
def media_shards(media, avprep, tmp_path_factory):
    """All videos, and one class of ESC-10."""
    root = tmp_path_factory.mktemp("real")
    raw = root / "raw"
    raw.mkdir()
    for path in media.iterdir():
        if path.is_file():
            shutil.copy(path, raw)
    shutil.copytree(media / "esc10" / "001 - Dog bark", raw / "dog")
    (raw / "broken").mkdir()
    (raw / "broken" / "empty.mp4").touch()
    (raw / "broken" / "text.mp4").write_text("this is no video\n" * 100)
    (raw / "broken" / "cut.mkv").write_bytes((media / "pancake.mkv").read_bytes()[:150_000])
    (raw / "broken" / "no_moov.mp4").write_bytes((media / "bikes.mp4").read_bytes()[:100_000])
    done = avprep("build", "--dataset", "folder", "--raw", raw, "--out", root / "out")
    assert done.returncode == 0, done.stderr
    return root / "out" / "folder" / "train", done.stdout, raw


def test_counts_add_up(media_shards):
    folder, printed, raw = media_shards
    counts = _index(folder)["counts"]
    files = sum(path.is_file() for path in raw.rglob("*"))
    skipped, failed = sum(counts["sources_skipped"].values()), sum(counts["sources_failed"].values())
    assert counts["sources_found"] == files == counts["sources_written"] + skipped + failed
    failures = [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]
    assert {line["path"]: (line["stage"], line["reason"]) for line in failures} == {
        "corrupted.mp4": ("decode", "corrupt stream"),
        "broken/empty.mp4": ("probe", "empty file"),
        "broken/text.mp4": ("probe", "not a readable media file"),
        "broken/no_moov.mp4": ("probe", "not a readable media file"),
        "broken/cut.mkv": ("probe", "truncated"),
    }
    rows = pq.read_table(folder / "sources.parquet").to_pylist()
    assert [row["name"] for row in rows if row["status"] == "skipped"] == ["README.md"] and skipped == 1
    for part in (f"{files} files found", "5 (", "1 corrupt stream", "seconds of video a second", str(folder)):
        assert part in printed


def test_videos_become_the_clips_their_readme_promises(media_shards):
    samples = {key: info for key, (info, _) in _samples(media_shards[0]).items()}
    assert {key for key in samples if key.startswith("v2d_test")} == {f"v2d_test-{number:04d}" for number in range(5)}
    assert [samples[f"v2d_test-{number:04d}"]["frames"] for number in range(5)] == [480, 480, 480, 480, 42]
    assert samples["v2d_test-0003"]["start_s"] == 90 and samples["v2d_test-0003"]["end_s"] == 120
    assert samples["mmaction_demo-0000"]["missing"] == samples["bikes-0000"]["missing"] == ["sound"]
    # The better of two streams is 480 x 270, its sound lasts 13.06 s.
    assert (samples["nasa-0000"]["width"], samples["nasa-0000"]["height"]) == (284, 160)
    assert abs(samples["nasa-0000"]["sound_s"] - 13.056) < 0.01
    assert (samples["h265-0000"]["width"], samples["h265-0000"]["frames"]) == (128, 16)  # never enlarged; 10 -> 16 fps
    # Pixels of 64:51: shown as 5:3.
    assert abs(samples["mmaction_demo-0000"]["width"] / samples["mmaction_demo-0000"]["height"] - 5 / 3) < 0.01
    assert samples["bigbuckbunny-0000"]["missing"] == []
    dogs = [info for info in samples.values() if info["source"].startswith("dog/")]
    assert len(dogs) == len(list((media_shards[2] / "dog").iterdir())) >= 5
    assert all(info["missing"] == ["picture"] and info["mel_frames"] == 320 for info in dogs)
    assert all(info["labels"] == [1] for info in dogs) and samples["bikes-0000"]["labels"] == []


def test_surround_sound_is_the_mean_of_its_channels(media, media_shards):
    """5.1 against the mean of what PyAV decodes, through librosa."""
    import av
    import librosa
    import numpy as np

    resampler = av.AudioResampler("fltp", "5.1", 44_100)
    with av.open(str(media / "bigbuckbunny.mp4")) as container:
        parts = [out.to_ndarray().mean(0) for frame in container.decode(audio=0) for out in resampler.resample(frame)]
    theirs = np.log(1e-6 + librosa.feature.melspectrogram(
        y=np.concatenate(parts)[:88_200], sr=44_100, n_fft=1380, hop_length=690, n_mels=80, htk=True, norm=None,
        pad_mode="reflect"))
    import io

    [members] = [members for key, (_, members) in _samples(media_shards[0]).items() if key == "bigbuckbunny-0000"]
    ours = np.load(io.BytesIO(members["logmel.npy"]))[:, :128].astype(np.float32)
    assert np.abs(ours - theirs)[:, 1:126].mean() < 0.05


def test_verify_accepts_media_shards_and_names_a_damaged_one(media_shards, avprep, tmp_path):
    folder, _, _ = media_shards
    assert avprep("verify", folder).returncode == 0
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard = copy / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    done = avprep("verify", copy)
    assert done.returncode == 1 and "train-000000.tar" in done.stdout and "checksum" in done.stdout
    shard.unlink()
    done = avprep("verify", copy)
    assert done.returncode == 1 and "train-000000.tar: missing" in done.stdout


SHARD_MB = 0.08


@pytest.fixture(scope="module")
def brief(small_demo, ffmpeg, tmp_path_factory):
    """The first 8 s of the small demo's ten training videos. To be read only."""
    raw = tmp_path_factory.mktemp("brief") / "raw"
    for path in sorted(small_demo.glob("train/*/*.mp4")):
        place = raw / path.relative_to(small_demo)
        place.parent.mkdir(parents=True, exist_ok=True)
        ffmpeg("-i", path, "-t", 8, "-c", "copy", place)
    return raw


@pytest.fixture(scope="module")
def undisturbed(brief, avprep, tmp_path_factory):
    """Its train split in several shards, built by one worker in one go."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert _build(avprep, brief, out, 1).returncode == 0
    content = _bytes_of(out)
    assert sum(name.endswith(".tar") for name in content) >= 4
    return content


def _build(avprep, raw, out, workers, *more):
    return avprep("build", "--dataset", "demo", "--raw", raw, "--out", out, "--shard-mb", SHARD_MB, "--workers",
                  workers, *more)


def test_same_bytes_with_other_workers_and_a_second_run_does_nothing(brief, avprep, undisturbed, tmp_path):
    assert _build(avprep, brief, tmp_path, 3).returncode == 0
    assert _bytes_of(tmp_path) == undisturbed
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    again = _build(avprep, brief, tmp_path, 2)
    assert "all shards were there already" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")} == before
    assert _bytes_of(tmp_path) == undisturbed
    forced = _build(avprep, brief, tmp_path, 2, "--force")
    assert forced.returncode == 0 and _bytes_of(tmp_path) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")} != before


@pytest.mark.slow
def test_killed_at_random_moments(brief, avprep, undisturbed, tmp_path):
    command = [sys.executable, "-m", "avprep.cli", "build", "--dataset", "demo", "--raw", str(brief), "--out",
               str(tmp_path), "--shard-mb", str(SHARD_MB), "--workers", "2"]
    moments = random.Random(0)
    killed = 0
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.5, 3))  # an undisturbed build takes 3 to 4 s, half of it to load what it needs
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in tmp_path.rglob("*.tar"):  # what stands under its final name is whole
            assert path.read_bytes() == undisturbed[path.relative_to(tmp_path).as_posix()]
    assert killed >= 1
    assert _build(avprep, brief, tmp_path, 2).returncode == 0
    assert _bytes_of(tmp_path) == undisturbed
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("scratch/*"))


@pytest.mark.parametrize(("number", "code"), [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_who_is_told_to_end_says_so_and_loses_nothing(brief, avprep, undisturbed, tmp_path, number, code):
    # Tests that run as a shell's background job ignore Ctrl-C, and what they start inherits that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "avprep.cli", "build", "--dataset", "demo", "--raw", str(brief), "--out",
         str(tmp_path), "--shard-mb", str(SHARD_MB), "--workers", "1"], stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "demo/train/.build").glob("train-*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, printed = process.communicate(timeout=30)
    assert process.returncode == code, printed
    assert not list(tmp_path.rglob("*.part"))
    assert "run the same command again" in printed and "Traceback" not in printed
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")
                if (path.parent / ".build" / f"{path.stem}.json").exists()}  # written after the tar
    assert 0 < len(finished) < sum(name.endswith(".tar") for name in undisturbed)
    done = _build(avprep, brief, tmp_path, 2)
    assert done.returncode == 0 and _bytes_of(tmp_path) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_changed_files_and_spec_are_built_anew(brief, avprep, undisturbed, tmp_path):
    raw = tmp_path / "raw"
    shutil.copytree(brief, raw)
    assert _build(avprep, raw, tmp_path / "out", 2).returncode == 0
    next(iter((raw / "train" / "turn").iterdir())).unlink()
    done = _build(avprep, raw, tmp_path / "out", 2)
    assert "9 files found" in done.stdout and len(_samples(tmp_path / "out/demo/train")) == 9
    done = _build(avprep, raw, tmp_path / "out", 2, "--short-side", 48, "--limit", 2)
    assert done.returncode == 0
    index = _index(tmp_path / "out/demo/train")
    assert index["spec"]["short_side"] == 48 and index["counts"]["clips"] == 2
    assert len(list((tmp_path / "out/demo/train").glob("*.tar"))) == len(index["shardlist"])  # no stale shard
    assert {info["height"] for info, _ in _samples(tmp_path / "out/demo/train").values()} == {48}


def _tars(folder):
    return sorted(path.name for path in folder.glob("*.tar"))


def _listed(folder):
    return [entry["url"] for entry in _index(folder)["shardlist"]]


def test_a_forced_build_of_fewer_files_leaves_only_its_own_tars(brief, avprep, tmp_path):
    folder = tmp_path / "demo" / "train"
    assert _build(avprep, brief, tmp_path, 2).returncode == 0
    before = _tars(folder)
    assert _build(avprep, brief, tmp_path, 2, "--limit", 2, "--force").returncode == 0
    assert _tars(folder) == _listed(folder) and 0 < len(_tars(folder)) < len(before)


def test_a_shard_whose_clips_all_fail_now_loses_its_tar(media, avprep, tmp_path):
    raw, folder = tmp_path / "raw", tmp_path / "folder" / "train"
    raw.mkdir()
    shutil.copy(media / "h265.mp4", raw / "good.mp4")
    shutil.copyfile(media / "h265.mp4", raw / "changing.mp4")
    build = ("build", "--dataset", "folder", "--raw", raw, "--out", tmp_path, "--shard-mb", 0.001)  # a clip a shard
    assert avprep(*build).returncode == 0
    assert _tars(folder) == _listed(folder) and len(_tars(folder)) == 2
    shutil.copyfile(media / "corrupted.mp4", raw / "changing.mp4")
    assert avprep(*build).returncode == 0
    assert list(_samples(folder)) == ["good-0000"] and _tars(folder) == _listed(folder)


def test_killed_between_a_tar_and_its_marker(ffmpeg, avprep, tmp_path, monkeypatch):
    """The marker of an earlier build must not vouch for another tar of the same size."""
    import avprep.build as building
    from avprep import state
    from avprep.spec import ClipSpec

    raw, folder = tmp_path / "raw", tmp_path / "folder" / "train"
    (raw / "b").mkdir(parents=True)
    ffmpeg("-f", "lavfi", "-i", "sine=440:r=8000:d=5", raw / "b" / "tone.wav")
    build = ("build", "--dataset", "folder", "--raw", raw, "--out", tmp_path, "--shard-mb", 0.001)  # a clip a shard
    assert avprep(*build).returncode == 0
    shutil.copytree(raw / "b", raw / "a")  # another class, so b gets another number

    def killed(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(state, "write_whole", killed)
        building.build_split(building.BuildOptions("folder", raw, tmp_path, ClipSpec(), 1, 1000, 60), "train")
    shutil.rmtree(raw / "a")
    assert avprep(*build).returncode == 0
    checked = avprep("verify", folder)
    assert checked.returncode == 0, checked.stdout


def test_only_one_build_at_a_time(brief, avprep_process, tmp_path):
    import fcntl

    state = tmp_path / "demo" / "train" / ".build"
    state.mkdir(parents=True)
    with (state / "lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        done = _build(avprep_process, brief, tmp_path, 1)
    assert done.returncode == 1 and "another avprep build" in done.stderr


def test_all_files_failing_is_an_error(avprep, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.mp4").write_text("nothing")
    (raw / "b.mkv").touch()
    done = avprep("build", "--dataset", "folder", "--raw", raw, "--out", tmp_path)
    assert done.returncode == 1 and "not one clip" in done.stderr and "2 files found" in done.stdout


def test_time_out_is_a_failure_like_any_other(media, avprep, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    shutil.copy(media / "v2d_test.mp4", raw)
    shutil.copy(media / "h265.mp4", raw)
    done = avprep("build", "--dataset", "folder", "--raw", raw, "--out", tmp_path, "--timeout", 0.25)
    [failure] = [json.loads(line) for line in (tmp_path / "folder/train/failures.jsonl").read_text().splitlines()]
    assert (failure["path"], failure["reason"]) == ("v2d_test.mp4", "time-out")
    assert failure["clips_failed"] >= 4 and "1 time-out" in done.stdout
    again = avprep("build", "--dataset", "folder", "--raw", raw, "--out", tmp_path)  # now with time enough
    assert "all shards were there already" in again.stdout and "1 time-out" in again.stdout


def test_a_file_that_could_not_be_opened_is_looked_at_in_every_run(media, avprep, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    shutil.copy(media / "h265.mp4", raw / "good.mp4")
    (raw / "late.mp4").write_bytes((media / "bikes.mp4").read_bytes()[:100_000])  # still being copied
    build = ("build", "--dataset", "folder", "--raw", raw, "--out", tmp_path)
    assert "1 written" in avprep(*build).stdout
    (raw / "late.mp4").write_bytes((media / "bikes.mp4").read_bytes())
    assert "2 written" in avprep(*build).stdout


def test_a_killed_ffmpeg_is_not_blamed_on_the_file(media, avprep_process, tmp_path):
    """The kernel kills whoever takes the most when memory runs out; here an ffmpeg kills itself."""
    raw, fake = tmp_path / "raw", tmp_path / "bin" / "ffmpeg"
    raw.mkdir()
    fake.parent.mkdir()
    shutil.copy(media / "h265.mp4", raw)
    fake.write_text("""#!/bin/sh
case "$*" in
  *-encoders*) echo libx264;;
  *-version*) echo ffmpeg version 0;;
  *) kill -9 $$;;
esac
""")
    fake.chmod(0o755)
    done = avprep_process("build", "--dataset", "folder", "--raw", raw, "--out", tmp_path,
                          env={**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"})
    [failure] = [json.loads(line) for line in (tmp_path / "folder/train/failures.jsonl").read_text().splitlines()]
    assert failure["reason"] == "ffmpeg was killed" and "signal 9" in failure["detail"]
    assert "fewer --workers" in failure["detail"] and "1 ffmpeg was killed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("minutes", "most_bytes"), [(20, 0.85e9), (120, 1e9)])
def test_memory_stays_flat_over_a_long_video(ffmpeg, tmp_path, minutes, most_bytes):
    """In under 1 GB, ffmpeg included: 0.7 GB, and 5 MB more for each clip whose sound would be kept."""
    raw = tmp_path / "raw"
    raw.mkdir()
    ffmpeg("-f", "lavfi", "-i", f"testsrc2=s=64x48:r=2:d={60 * minutes}", "-f", "lavfi", "-i",
           f"sine=440:r=8000:d={60 * minutes}", "-c:v", "libx264", "-preset", "ultrafast", "-g", 20, "-c:a",
           "pcm_s16le", raw / "long.mkv")
    command = [sys.executable, "-m", "avprep.cli", "build", "--dataset", "folder", "--raw", str(raw), "--out",
               str(tmp_path), "--workers", "2"]
    peak_bytes = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        while process.poll() is None:
            peak_bytes = max(peak_bytes, _tree_bytes(process.pid))
            time.sleep(0.02)
        assert process.returncode == 0 and f"{2 * minutes} clips, {minutes / 60:.2f} h" in process.stdout.read()
    assert 50e6 < peak_bytes < most_bytes


def _tree_bytes(pid):
    """Resident memory of a process and all below it, bytes."""
    total = 0
    try:
        process = psutil.Process(pid)
        itself = process.cmdline()
        for member in [process, *process.children(recursive=True)]:
            if member == process or member.cmdline() != itself:  # a child that only begins shares its parent's memory
                total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def test_ray_gives_the_same_bytes(brief, avprep_process, undisturbed, tmp_path):
    pytest.importorskip("ray", reason="ray is an extra: pip install '.[ray]'")
    done = _build(avprep_process, brief, tmp_path, 2, "--executor", "ray")
    assert done.returncode == 0, done.stderr
    assert _bytes_of(tmp_path) == undisturbed


def test_ray_absent_is_said(brief, avprep, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it fails
    hidden = avprep("build", "--dataset", "demo", "--raw", brief, "--out", tmp_path / "out", "--executor", "ray")
    assert hidden.returncode == 1 and "pip install" in hidden.stderr and "Traceback" not in hidden.stderr
