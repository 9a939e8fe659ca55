"""What reads strangers' files has limits, and does not outlive avprep."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from avprep import headers, media
from avprep.confined import NOT_STARTED, confined
from avprep.errors import AvprepError, SourceFailed
from avprep.probe import probe
from avprep.spec import ClipSpec

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are set on Linux only")


def _run(script, memory_bytes=1 << 30, cpu_s=10, file_bytes=1 << 20):
    return subprocess.run(confined([b"/bin/sh", b"-c", script.encode()], memory_bytes, cpu_s, file_bytes),
                          capture_output=True, text=True, timeout=30)


def _cut(path, tmp_path, length_s=3.0):
    return media.cut_clip(path, probe(path), 0.0, length_s, ClipSpec(), tmp_path / "scratch.mp4", 60.0)


def test_limits_are_those_that_were_asked_for():
    done = _run("cat /proc/self/limits /proc/self/status", 100_000_000, 7.5, 1e300)
    limits = {line[:26].strip(): line[26:].split()[:2] for line in done.stdout.splitlines() if line.startswith("Max")}
    assert limits["Max data size"] == ["100000000"] * 2 and limits["Max cpu time"] == ["7", "8"]
    assert limits["Max core file size"] == ["0", "0"] and int(limits["Max address space"][0]) < 3e9
    assert "NoNewPrivs:\t1" in done.stdout


def test_who_goes_beyond_is_ended(tmp_path):
    assert _run("while :; do :; done", cpu_s=1).returncode == -signal.SIGXCPU
    assert _run(f"exec head -c 3000 /dev/zero > {tmp_path}/file", file_bytes=1000).returncode == -signal.SIGXFSZ
    assert (tmp_path / "file").stat().st_size <= 1000
    assert subprocess.run(confined([b"/nowhere"], 1e9, 1, 1), capture_output=True).returncode == NOT_STARTED


def test_a_picture_that_takes_too_much_memory(ffmpeg, tmp_path, monkeypatch):
    ffmpeg("-f", "lavfi", "-i", "color=s=5000x5000:r=1:d=1", "-pix_fmt", "yuvj444p", "-c:v", "mjpeg",
           tmp_path / "large.mkv")
    monkeypatch.setattr(media, "MEMORY_BYTES", 130_000_000)
    with pytest.raises(SourceFailed, match="too large .to decode it takes more than 0.13 GB"):
        _cut(tmp_path / "large.mkv", tmp_path, 1.0)


def test_tables_that_take_too_much_memory(short_video, monkeypatch):
    def hungry(path):
        raise MemoryError

    monkeypatch.setattr(headers, "probe", hungry)
    assert str(headers.read_header(short_video)) == "probe: too large (to read it takes more than 1.25 GB)"


def test_an_ffmpeg_that_cannot_be_started_ends_the_build(short_video, tmp_path, monkeypatch):
    monkeypatch.setattr(media, "ffmpeg_version", lambda: "6.0")
    monkeypatch.setattr(media, "ffmpeg_path", lambda: str(tmp_path / "none"))
    with pytest.raises(AvprepError, match="none can't be started: No such file"):
        _cut(short_video, tmp_path)


# An avprep whose ffmpeg, or whose reader of headers, never ends.
_ENDLESS = """
import os, sys, time
from pathlib import Path
from avprep import headers, media
from avprep.probe import probe
from avprep.spec import ClipSpec

video, folder, who = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if who == "ffmpeg":
    media.ffmpeg_version, media.ffmpeg_path = lambda: "6.0", lambda: str(folder / "ffmpeg")
    media.cut_clip(video, probe(video), 0.0, 3.0, ClipSpec(), folder / "scratch.mp4", 60.0)
headers._COMMAND = (sys.executable, "-c", '''
import os, sys, time
sys.path = sys.argv[1:]
from avprep import headers
def endless(path):
    open(path.parent / "pid", "w").write(str(os.getpid()))
    time.sleep(60)
headers.probe = endless
headers.serve()
''')
headers.HeaderReader().read(folder / "video.mp4")
"""


@pytest.mark.parametrize("who", ["ffmpeg", "reader"])
def test_none_outlives_a_killed_avprep(short_video, tmp_path, who):
    (tmp_path / "ffmpeg").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/part; mv {tmp_path}/part {tmp_path}/pid\n"
                                     "exec sleep 60\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    (tmp_path / "video.mp4").write_bytes(short_video.read_bytes())
    avprep = subprocess.Popen([sys.executable, "-c", _ENDLESS, short_video, tmp_path, who],
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    child = _soon(lambda: psutil.Process(int(Path(tmp_path / "pid").read_text())))
    avprep.kill()
    avprep.wait()
    _soon(lambda: None if child.is_running() and child.status() != psutil.STATUS_ZOMBIE else True)


def _soon(ask, within_s=30.0):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if found := ask():
                return found
        except (OSError, ValueError):
            pass
        time.sleep(0.02)
    raise AssertionError("it did not happen")
