"""Shards, manifests and indexes of strangers: what is wrong is refused in a line, before memory is taken."""

import gzip
import io
import json
import socket
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from avtrain.config import DataConfig
from avtrain.data.clips import check_spec
from avtrain.data.decode import ClipUnreadable, decode_frames, decode_log_mel, decode_rgb
from avtrain.data.manifest import schema
from avtrain.data.shards import Shard, open_folders
from avtrain.data.stream import samples
from avtrain.errors import AvtrainError
from benchmarks.manifest import make_folder


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path, 10)
    return tmp_path


def _refused(folder, message):
    with pytest.raises(AvtrainError, match=message) as caught:
        open_folders([str(folder)])
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1000


def _entry(**values):
    return lambda index: index["shardlist"][0].update(values)


# --- indexes

@pytest.mark.parametrize(("change", "message"), [
    *((_entry(url=url), "does not lie beside its index") for url in (
        "../secret.tar", "/etc/passwd", "a/b.tar", "..", "", "a::file", "http://127.0.0.1/a.tar", "file:a.tar",
        "a%2fb.tar", "a?b", "a#b", "a\\b", "a\0b", "a\nb", "*.tar", "x" * 300, ".hidden")),
    *((_entry(filesize=size), "is damaged: ") for size in (-1, 0, 10, 1e300, float("inf"), float("nan"), "x", None, [],
                                                           1 << 60)),
    *((_entry(nsamples=count), "is damaged: ") for count in (-1, 10**15, float("inf"), "x", None)),
    (lambda index: index.update(spec={"segment_frames": 0}), "is damaged: no spec.segment_frames"),
    (lambda index: index.update(spec={"reference_step": "x"}), "is damaged: no spec.reference_step"),
    (lambda index: index.update(spec=[]), "is damaged: no spec"),
    (lambda index: index.update(shardlist=[5]), "is damaged: "),
    (lambda index: index.update(shardlist={}), "is damaged: no shardlist")])
def test_an_index_that_claims_what_can_not_be(folder, change, message):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))
    _refused(folder, message)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\0", '{"format": "avprep-shards"',
                                     "[]", "null", "NaN"])
def test_an_index_that_is_none(folder, content):
    (folder / "index.json").write_text(content)
    _refused(folder, "is not ")


def test_a_spec_without_its_numbers(folder):
    with pytest.raises(AvtrainError, match="the shards have mel_bands None"):
        check_spec(open_folders([str(folder)]), DataConfig())


# --- manifests

def _changed(folder, **columns):
    table = pq.read_table(folder / "clips.parquet")
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), schema().field(name), pa.chunked_array([values]))
    pq.write_table(table, folder / "clips.parquet", compression="zstd")


def test_a_text_that_is_said_again_and_again(folder):
    _changed(folder, shard=pa.array(["x" * 2_000_000] * 10))
    _refused(folder, "a shard of more than 1000 letters")
    _changed(folder, shard=pa.array(["train-000000.tar"] * 10), key=pa.array(["x" * 2_000_000] * 10))
    _refused(folder, "a key of more than 1000 letters")


def test_a_million_labels_of_a_clip(folder):
    _changed(folder, labels=pa.array([[0] * 1_000_000] * 10, pa.list_(pa.int32())))
    assert (folder / "clips.parquet").stat().st_size < 100_000
    _refused(folder, "10000000 labels of 10 clips")


def test_rows_that_no_file_has_room_for(tmp_path):
    rows = 1_000_000
    same = pa.table({field.name: pa.nulls(rows, field.type) for field in schema()}, schema=schema())
    pq.write_table(same, tmp_path / "clips.parquet", compression="zstd", row_group_size=rows)
    make = {"format": "avprep-shards", "format_version": 2, "spec": {}, "classes": [], "multi_label": False,
            "shardlist": [{"url": "a.tar", "nsamples": rows, "filesize": 1 << 40, "sha256": "0" * 64}]}
    (tmp_path / "index.json").write_text(json.dumps(make))
    _refused(tmp_path, "1000000 rows in ")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\xff" * 100 + b"PAR1", bytes(1000)])
def test_a_manifest_that_is_none(folder, content):
    (folder / "clips.parquet").write_bytes(content)
    _refused(folder, "clips.parquet is not the manifest that goes with its index")


def test_a_member_that_no_clip_is_as_large_as(folder):
    index = json.loads((folder / "index.json").read_text())
    index["shardlist"][0]["filesize"] = 1 << 42
    (folder / "index.json").write_text(json.dumps(index))
    _changed(folder, json_size=pa.array([900] * 9 + [1 << 41], pa.int64()))
    _refused(folder, "row 10 .*a member of more than 1 GiB")


# --- tars

def _tar(*members, **options):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _info(name, size=0, kind=tarfile.REGTYPE, **more):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for field, value in more.items():
        setattr(info, field, value)
    return info


def _sparse():
    """A few blocks that say they are 2^40 bytes."""
    header = bytearray(_info("a.mp4", 0, tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"\x80" + (1 << 40).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header[:512]) + bytes(1024)


def _huge():
    return _info("a.mp4", 1 << 40).tobuf(tarfile.GNU_FORMAT) + bytes(2048)


TARS = {
    "a link": _tar((_info("a.mp4", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), b"")),
    "a hard link": _tar((_info("a.mp4", kind=tarfile.LNKTYPE, linkname="../../etc/passwd"), b"")),
    "a device": _tar((_info("a.mp4", kind=tarfile.CHRTYPE), b"")),
    "a pipe": _tar((_info("a.mp4", kind=tarfile.FIFOTYPE), b"")),
    "a folder": _tar((_info("a.mp4", kind=tarfile.DIRTYPE), b"")), "a sparse file": _sparse(), "a huge size": _huge(),
    "the same twice": _tar(*[(_info("a.mp4", 1), b"x")] * 2),
    "a long header": _tar((_info("a" * 100_000, 1), b"x"), format=tarfile.PAX_FORMAT),
    "packed": gzip.compress(_tar((_info("a.mp4", 10_000_000), bytes(10_000_000)))), "noise": b"\xff" * 4096,
    "cut": _tar((_info("a.mp4", 5000), bytes(5000)))[:3000]}


@pytest.mark.parametrize("kind", TARS)
def test_a_tar_of_another_kind_is_named_and_refused(tmp_path, kind):
    (tmp_path / "a.tar").write_bytes(TARS[kind])
    with pytest.raises(AvtrainError, match=r"a\.tar( can't be read as a tar|: its checksum)"):
        list(samples([Shard(str(tmp_path / "a.tar"), 1, len(TARS[kind]), "0" * 64)]))


def test_names_of_members_are_never_places(tmp_path):
    names = ("../../outside.mp4", "/outside.mp4", "a/../../outside.mp4")
    content = _tar(*((_info(name, 1), b"x") for name in names))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.tar").write_bytes(content)
    with pytest.raises(AvtrainError, match="checksum"):
        list(samples([Shard(str(tmp_path / "in/a.tar"), 3, len(content), "0" * 64)]))
    assert [path.name for path in tmp_path.rglob("*.mp4")] == []


# --- log-mels and pictures

def _npy(header, body=b""):
    text = header.encode() + b" " * 10 + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


def _zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(10_000_000))
    return file.getvalue()


def _pickled():
    file = io.BytesIO()
    np.save(file, np.array([{}], object), allow_pickle=True)
    return file.getvalue()


_HEADER = "{{'descr': '{}', 'fortran_order': False, 'shape': {}}}"
LOG_MELS = {
    "a pickle": _pickled(), "a bare pickle": b"\x80\x04N.", "an archive": _zip(), "nothing": b"",
    "noise": b"\xff" * 100,
    "far too large": _npy(_HEADER.format("<f2", "(80, 1000000000000)")), "of negative size": _npy(_HEADER.format(
        "<f2", "(-80, -1)"), bytes(160)), "a little short": _npy(_HEADER.format("<f2", "(80, 2)"), bytes(319)),
    "a little long": _npy(_HEADER.format("<f2", "(80, 2)"), bytes(321)),
    "of another type": _npy(_HEADER.format("<f8", "(80, 1)"), bytes(640)),
    "of objects": _npy(_HEADER.format("|O", "(80, 1)"), bytes(640)), "of three dimensions": _npy(_HEADER.format(
        "<f2", "(80, 1, 1)"), bytes(160)), "not finite": _npy(_HEADER.format("<f2", "(80, 1)"), b"\x00\x7e" * 80),
    "deeply nested": _npy("-" * 9000 + "1"), "brackets": _npy("(" * 9000), "a call": _npy("__import__('os').getpid()"),
    "a later version": b"\x93NUMPY\x09\x00" + bytes(100)}


@pytest.mark.parametrize("kind", LOG_MELS)
def test_a_log_mel_of_another_kind(kind):
    with pytest.raises(ClipUnreadable, match="its log-mel"):
        decode_log_mel(LOG_MELS[kind])


@pytest.mark.parametrize("order", [False, True])
def test_a_log_mel_is_what_numpy_wrote(order):
    values, file = np.arange(160, dtype=np.float16).reshape(80, 2), io.BytesIO()
    np.save(file, np.asfortranarray(values) if order else values)
    read = decode_log_mel(file.getvalue())
    assert np.array_equal(read, values) and read.flags.writeable


def _video(ffmpeg, path, *arguments):
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=32x32:r=4:d=1", *arguments, path)
    return path.read_bytes()


@pytest.mark.parametrize("decode", [lambda mp4: decode_frames(mp4, 1), decode_rgb])
def test_pictures_of_another_kind(ffmpeg, tmp_path, decode):
    h264 = ("-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt")
    good = _video(ffmpeg, tmp_path / "good.mp4", *h264, "yuv420p")
    decode(good)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        (tmp_path / "canary.ts").write_bytes(good)
        playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n"
        for content in (
                _video(ffmpeg, tmp_path / "a.mp4", *h264, "yuv444p"),
                _video(ffmpeg, tmp_path / "b.mp4", "-c:v", "mpeg4"),
                _video(ffmpeg, tmp_path / "c.mkv", *h264, "yuv420p"), good[:500], b"", b"\xff" * 1000,
                playlist.format(f"http://127.0.0.1:{server.getsockname()[1]}/a.ts").encode(),
                playlist.format(tmp_path / "canary.ts").encode(),
                f"ffconcat version 1.0\nfile {tmp_path}/canary.ts\n".encode()):
            with pytest.raises(ClipUnreadable, match="its video"):
                decode(content)
        with pytest.raises(BlockingIOError):
            server.accept()
