"""The command line as people meet it: quick, and kind about mistakes."""

import subprocess
import sys
import time

import pytest


def _fastest(command, times):
    durations = []
    for _ in range(times):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        durations.append(time.perf_counter() - started)
    return min(durations)


def test_help_answers_in_half_a_second_without_heavy_imports():
    assert _fastest([sys.executable, "-m", "avprep.cli", "--help"], 3) < 0.5
    code = ("import sys; from avprep.cli import main; main(['build', '--help'], standalone_mode=False);"
            "print([name for name in ('torch', 'librosa', 'numpy', 'av', 'matplotlib') if name in sys.modules])")
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("arguments", "expected"), [
    (("build", "--dataset", "kinetcs"), "kinetics700"),
    (("build", "--splt", "train"), "--split"),
    (("build", "--raw", "nowhere"), "no folder nowhere"),
    (("build", "--dataset", "demo", "--frames", "100"), "multiple of --segment-frames"),
    (("build", "--dataset", "demo", "--crf", "99"), "--crf is 99"),
    (("build", "--workers", "0"), "--workers"),
    (("build", "--shard-mb", "nan"), "--shard-mb nan: a number is wanted"),
    (("build", "--timeout", "inf"), "--timeout inf: a number is wanted"),
    (("info", "nowhere"), "no folder nowhere"),
    (("verify", "."), "index.json"),
    (("preview", "nowhere"), "no folder nowhere"),
    (("frobnicate",), "No such command"),
])
def test_mistakes_are_answered_in_a_line(avprep, tmp_path, arguments, expected):
    done = avprep(*arguments, cwd=tmp_path)
    assert done.returncode in (1, 2) and expected in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
    assert not list(tmp_path.iterdir())


def test_settings_come_from_the_environment_too(avprep, small_demo, tmp_path):
    import os

    done = avprep("build", "--dataset", "demo", env={**os.environ, "AVPREP_BUILD_RAW": str(small_demo),
                                                     "AVPREP_BUILD_OUT": str(tmp_path), "AVPREP_BUILD_LIMIT": "1"})
    assert done.returncode == 0 and "1 files found = 1 written" in done.stdout
    assert (tmp_path / "demo/train/index.json").exists()


def test_info_and_preview(avprep, tiny_demo, tmp_path):
    from PIL import Image

    done = avprep("build", "--dataset", "demo", "--raw", tiny_demo, "--out", tmp_path, "--split", "all")
    assert done.returncode == 0
    done = avprep("info", tmp_path)
    assert done.returncode == 0
    for part in ("clips    4 in 1 shards, 0.03 h", "clips    2 in", "fps 16", "grow", "0 without sound",
                 "lengths  shortest 30.0 s, median 30.0 s, longest 30.0 s"):
        assert part in done.stdout
    done = avprep("preview", tmp_path, "-o", tmp_path / "sheet.png", "--clips", 3)
    assert done.returncode == 0 and "3 clips" in done.stdout
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 1500 and sheet.height > 500
        assert len(sheet.convert("RGB").getcolors(1 << 24)) > 1000
    wrong = avprep("preview", tmp_path, "-o", tmp_path / "sheet.xyz")
    assert wrong.returncode == 1 and "sheet.xyz" in wrong.stderr and "Traceback" not in wrong.stderr


def test_demo_refuses_a_folder_with_files(avprep, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    done = avprep("demo", "--out", tmp_path)
    assert done.returncode == 1 and "not empty" in done.stderr and (tmp_path / "mine.txt").exists()


def test_demo_leaves_nothing_of_a_run_that_was_stopped(avprep, tmp_path):
    left = tmp_path / "demo.part" / "train" / "bounce"
    left.mkdir(parents=True)
    (left / "0000.f32").write_bytes(b"half a sound")
    (left / "9999.mp4").write_bytes(b"half a video")
    done = avprep("demo", "--out", tmp_path / "demo", "--train", 1, "--test", 1)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.rglob("*.*") if path.is_file()] == ["0000.mp4", "0000.mp4"]


@pytest.mark.parametrize(("train", "test"), [(3, 1), pytest.param(10, 2, marks=pytest.mark.slow)])
def test_demo_is_the_same_every_time(avprep, small_demo, tmp_path, train, test):
    """However many videos there are beside one."""
    counts = ("--train", train, "--test", test)
    assert avprep("demo", "--out", tmp_path / "again", *counts, "--workers", 1).returncode == 0
    again = {path.relative_to(tmp_path / "again"): path.read_bytes() for path in (tmp_path / "again").rglob("*.mp4")}
    first = {path.relative_to(small_demo): path.read_bytes() for path in small_demo.rglob("*.mp4")
             if int(path.stem) < {"train": train, "test": test}[path.parts[-3]]}
    assert first == again and len(first) == train + test
    assert avprep("demo", "--out", tmp_path / "other", *counts, "--seed", 1).returncode == 0
    assert all((tmp_path / "other" / name).read_bytes() != content for name, content in first.items())


def test_builds_where_no_ffmpeg_is_installed(small_demo, avprep_process, tmp_path):
    """Only the binary of the wheel is left when PATH has none."""
    import os

    done = avprep_process("build", "--dataset", "demo", "--raw", small_demo, "--out", tmp_path, "--limit", 1,
                          env={**os.environ, "PATH": str(tmp_path)})
    assert done.returncode == 0 and "1 files found = 1 written" in done.stdout, done.stderr


@pytest.mark.slow
def test_commands_end_well_every_time(avprep_process, demo_shards):
    """A thread of pyarrow's that still ran at the end would abort the process, now and then."""
    codes = [avprep_process("info", demo_shards).returncode for _ in range(12)]
    assert codes == [0] * 12
