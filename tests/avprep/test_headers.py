"""Headers are read in processes that may die: the file that kills one fails alone."""

import json
import os
import subprocess
import sys

import pytest

import avprep.build as building
from avprep import headers
from avprep.errors import AvprepError
from avprep.spec import ClipSpec

# A reader of headers that some files kill, stop or make talk, in place of libav.
READER = """
import os, signal, sys, time
sys.path = sys.argv[1:]
from avprep import headers
probe = headers.probe

def fragile(path):
    if "segv" in path.name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "exit" in path.name:
        os._exit(7)
    if "hang" in path.name:
        time.sleep(60)
    if "talk" in path.name:
        os.write(1, b"[libav] a warning\\n")
    return probe(path)

headers.probe = fragile
headers.serve()
"""


@pytest.fixture
def fragile(monkeypatch):
    monkeypatch.setattr(headers, "_COMMAND", (sys.executable, "-c", READER))
    monkeypatch.setattr(headers, "_TIMEOUT_S", 3.0)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_file_that_kills_its_reader_costs_one_line(fragile, put, tmp_path, short_video, workers):
    good = [f"{number}.mp4" for number in range(40)]  # enough for two readers
    put(short_video, *good, "segv 1.mp4", "segv 2.mp4", "exit.mp4", "talk.mp4", "hang.mp4")
    for _ in range(2):  # they are looked at in every run
        report = building.build_split(
            building.BuildOptions("folder", tmp_path / "raw", tmp_path, ClipSpec(), workers, 10**7, 60), "train")
        assert (report.found, report.written) == (45, 41)
    lines = (tmp_path / "folder/train/failures.jsonl").read_text().splitlines()
    assert {line["path"]: (line["reason"], line["detail"]) for line in map(json.loads, lines)} == {
        "segv 1.mp4": ("ffmpeg was killed", "reading its header, by signal 11"),
        "segv 2.mp4": ("ffmpeg was killed", "reading its header, by signal 11"),
        "exit.mp4": ("ffmpeg was killed", "reading its header, with code 7"),
        "hang.mp4": ("time-out", "after 3 s")}


def test_a_reader_that_is_killed_between_two_files_is_started_anew(put, tmp_path, short_video):
    put(short_video, "a.mp4")
    reader = headers.HeaderReader()
    first = reader.read(tmp_path / "raw/a.mp4")
    reader._process.kill()
    reader._process.wait()
    assert reader.read(tmp_path / "raw/a.mp4") == first
    process = reader._process
    assert reader.close() == 0 and process.poll() == 0 and reader.close() == 0


def test_a_reader_that_does_not_start_ends_the_build(monkeypatch, tmp_path):
    monkeypatch.setattr(headers, "_COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(AvprepError, match="does not start .code 3."):
        headers.HeaderReader().read(tmp_path / "a.mp4")


def test_no_reader_outlives_the_build(put, build, tmp_path, short_video):
    put(short_video, *(f"{number}.mp4" for number in range(3)))
    build("folder")
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listed


def test_a_title_that_is_not_utf8_and_a_codec_that_nobody_knows(ffmpeg, short_video, tmp_path):
    """Neither is a fault of the file's pictures or sound."""
    ffmpeg("-i", short_video, "-c", "copy", "-metadata", os.fsdecode(b"title=caf\xe9"), tmp_path / "title.mkv")
    assert headers.read_header(tmp_path / "title.mkv").video_index == 0
    (tmp_path / "codec.mp4").write_bytes(short_video.read_bytes().replace(b"avc1", b"qqqq"))
    assert headers.read_header(tmp_path / "codec.mp4").audio_index == 1
