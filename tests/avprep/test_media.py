"""What ffmpeg says of a failure becomes an error of ours, whatever the file is called."""

import os

import pytest

from avprep import media
from avprep.errors import DiskFull, SourceFailed
from avprep.probe import probe
from avprep.spec import ClipSpec

FULL = "No space left on device"


@pytest.mark.parametrize(("name", "said", "expected"), [
    ("a.mp4", f"[out#0/mp4 @ 0x5] Error writing trailer: {FULL}\nConversion failed!", "the disk is full: free some"),
    ("a.mp4", "[h264 @ 0x5] [error] no frame!\nConversion failed!", "decode: corrupt stream (no frame!)"),
    ("a.mp4", "", "decode: corrupt stream (ffmpeg ended with code 1)"),
    (f"a: {FULL}.mp4", f"Error opening input: %NAME%\nfile:%NAME%: {FULL}, they say", "decode: corrupt stream (Error"),
    (f": {FULL}\n.mp4", "file:%NAME%: Invalid data found when processing input", "decode: corrupt stream (file:")])
def test_what_ffmpeg_says_of_a_failure(short_video, tmp_path, monkeypatch, name, said, expected):
    path = tmp_path / name
    path.write_bytes(short_video.read_bytes())
    (tmp_path / "said").write_bytes(said.encode().replace(b"%NAME%", os.fsencode(path)))
    stand_in = tmp_path / "ffmpeg"
    stand_in.write_text(f'#!/bin/sh\n[ "$1" = -version ] && echo "ffmpeg version 6.0" && exit\n'
                        f'cat "{tmp_path}/said" >&2; exit 1\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(media, "ffmpeg_path", lambda: str(stand_in))
    with pytest.raises(DiskFull if "disk" in expected else SourceFailed) as caught:
        media.cut_clip(path, probe(path), 0.0, 3.0, ClipSpec(), tmp_path / "scratch.mp4", 60.0)
    assert str(caught.value).startswith(expected)
