"""A stranger's file may name other files, and places in the network: neither the probe nor ffmpeg looks at them."""

import ctypes
import os
import socket
import struct
from contextlib import contextmanager

import av
import pytest

from avprep.errors import SourceFailed
from avprep.headers import read_header
from avprep.media import cut_clip
from avprep.probe import Media
from avprep.spec import ClipSpec

_ACCESS, _OPEN = 0x1, 0x20  # of inotify
_HLS = "#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-TARGETDURATION:3\n{}#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n"
_DASH = """<?xml version="1.0"?>
<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT3S" minBufferTime="PT1S">
<Period><AdaptationSet mimeType="video/mp4"><Representation id="0" bandwidth="1" codecs="avc1.42c00a">
<BaseURL>{}</BaseURL></Representation></AdaptationSet></Period></MPD>"""
_SDP = """v=0
o=- 0 0 IN IP4 127.0.0.1
s=a
c=IN IP4 127.0.0.1
t=0 0
a=control:rtsp://127.0.0.1:PORT/a
m=video 0 RTP/AVP 96
a=rtpmap:96 H264/90000
"""
_MLV = b"MLVI" + struct.pack("<I8sQHHIHHIIII", 52, b"v2.0", 1, 0, 2, 0, 1, 0, 0, 0, 25000, 1000)
# The text of a file named trick.mp4, with canary.mp4 beside it at CANARY, and who listens at HTTP.
TEXTS = {
    "a playlist of a file": _HLS.format("", "canary.mp4"),
    "a playlist of an absolute path": _HLS.format("", "CANARY"),
    "a playlist of a file: address": _HLS.format("", "file:CANARY"),
    "a playlist of a part": _HLS.format("", "subfile,,start,0,end,9000,,:CANARY"),
    "a playlist of files joined": _HLS.format("", "concat:CANARY|CANARY"),
    "a playlist of a web address": _HLS.format("", "http://127.0.0.1:PORT/a.ts"),
    "a playlist of data": _HLS.format("", "data:video/mp2t;base64,R0AREA=="),
    "a playlist with a key": _HLS.format('#EXT-X-KEY:METHOD=AES-128,URI="http://127.0.0.1:PORT/key"\n', "canary.mp4"),
    "a playlist with a header": _HLS.format('#EXT-X-MAP:URI="canary.mp4"\n', "canary.mp4"),
    "a playlist of playlists": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nhttp://127.0.0.1:PORT/a.m3u8\n",
    "DASH of a file": _DASH.format("canary.mp4"),
    "DASH of a web address": _DASH.format("http://127.0.0.1:PORT/a.mp4"),
    "concat": "ffconcat version 1.0\nfile canary.mp4\nduration 3\n",
    "concat with options": "ffconcat version 1.0\nfile canary.mp4\noption safe 0\n",
    "SDP": _SDP,
    "VobSub": "# VobSub index file, v7\nid: en, index: 0\ntimestamp: 00:00:00:000, filepos: 000000000\n",
    "SVG": '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="64" height="64">'
           '<image xlink:href="CANARY" width="64" height="64"/></svg>',
    "an XML entity": '<?xml version="1.0"?><!DOCTYPE MPD [<!ENTITY a SYSTEM "file://CANARY">]>' + _DASH[22:].format(
        "&a;"),
}


@contextmanager
def watched(*paths):
    """Tells which of these files were opened since."""
    libc = ctypes.CDLL(None, use_errno=True)
    events = libc.inotify_init1(os.O_NONBLOCK)
    names = {libc.inotify_add_watch(events, os.fsencode(path), _ACCESS | _OPEN): path.name for path in paths}

    def opened():
        try:
            return {names[struct.unpack_from("i", os.read(events, 16))[0]]}
        except BlockingIOError:
            return set()

    try:
        yield opened
    finally:
        os.close(events)


@pytest.fixture
def listening():
    """(port, whether somebody has called) of a socket on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)

        def called():
            try:
                server.accept()[0].close()
                return True
            except BlockingIOError:
                return False

        yield server.getsockname()[1], called


@pytest.fixture
def folder(tmp_path, short_video):
    for name in ("canary.mp4", "trick.sub", "trick.m00"):
        (tmp_path / name).write_bytes(short_video.read_bytes())
    return tmp_path


def _looked_at(path):
    """By both who read strangers' files: the probe, and ffmpeg, as if the probe had let the file pass."""
    found = [read_header(path)]
    try:
        found.append(cut_clip(path, Media(3.0, 0, None, 0, picture_s=(0.0, 3.0)), 0.0, 3.0, ClipSpec(),
                              path.parent / "s.mp4", 30.0))
    except SourceFailed as failure:
        found.append(failure)
    return found


def _aliased(mp4, target):
    """The mp4 with each track's data in another file: Apple's alias record."""
    record = bytearray(150)
    record[10:12] = len("volume").to_bytes(1, "big") + b"v"
    name = os.fsencode(target.name)
    record[50:50 + 1 + len(name)] = bytes([len(name)]) + name
    path = os.fsencode(target)
    record[130:134] = struct.pack(">hh", 1, 1)
    tail = struct.pack(">hH", 2, len(path)) + path + b"\0" * (len(path) % 2) + struct.pack(">hH", -1, 0)
    entry = b"alis" + bytes(4) + bytes(record) + tail
    return _rebuilt(mp4, bytes(4) + struct.pack(">I", 1) + struct.pack(">I", len(entry) + 4) + entry)


def _rebuilt(atoms, reference):
    made, at = b"", 0
    while at < len(atoms):
        size, kind = struct.unpack_from(">I4s", atoms, at)
        content = atoms[at + 8:at + size]
        if kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
            content = _rebuilt(content, reference)
        elif kind == b"dref":
            content = reference
        made += struct.pack(">I4s", len(content) + 8, kind) + content
        at += size
    return made


def test_the_canary_and_the_socket_notice(folder, listening):
    """What the other tests rely on."""
    port, called = listening
    with watched(folder / "canary.mp4") as opened:
        assert opened() == set() and not called()
        (folder / "canary.mp4").read_bytes()
        socket.create_connection(("127.0.0.1", port)).close()
        assert opened() == {"canary.mp4"} and called()
    (folder / "trick.mp4").write_text(TEXTS["concat"])
    with watched(folder / "canary.mp4") as opened, av.open(str(folder / "trick.mp4")):
        assert opened() == {"canary.mp4"}  # libav itself does look


@pytest.mark.parametrize("trick", TEXTS)
def test_a_text_that_names_others(folder, listening, trick):
    port, called = listening
    path = folder / "trick.mp4"
    path.write_text(TEXTS[trick].replace("CANARY", str(folder / "canary.mp4")).replace("PORT", str(port)))
    with watched(folder / "canary.mp4", folder / "trick.sub") as opened:
        probed, cut = _looked_at(path)
        assert opened() == set() and not called()
    assert isinstance(probed, SourceFailed) and isinstance(cut, SourceFailed)
    assert ("concat" in trick or trick == "SDP") <= (probed.detail == "a list of other files")


def test_a_video_that_goes_on_in_another_file(folder):
    path = folder / "trick.mp4"
    path.write_bytes(_MLV + bytes(200))
    with watched(folder / "trick.m00") as opened:
        assert all(isinstance(one, SourceFailed) for one in _looked_at(path)) and opened() == set()


def test_a_movie_whose_data_lie_in_another_file(folder, short_video):
    path = folder / "trick.mp4"
    path.write_bytes(_aliased(short_video.read_bytes(), folder / "canary.mp4"))
    options = {"enable_drefs": "1", "use_absolute_path": "1"}
    with watched(folder / "canary.mp4") as opened:
        with av.open(str(path), options=options):
            assert opened() == {"canary.mp4"}  # libav would
    with watched(folder / "canary.mp4") as opened:
        assert isinstance(_looked_at(path)[0], SourceFailed) and opened() == set()


def test_names_that_are_addresses(folder, put, build):
    """They are names like any other."""
    names = ("subfile,,start,0,end,9,,:canary.mp4", "data:,a.mp4", "-i.mp4", "canary%d.gif", "canary1.gif")
    put(folder / "canary.mp4", *names)
    assert set(build("folder").by_source) == set(names)
