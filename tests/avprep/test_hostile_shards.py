"""Shards of strangers under `avprep info`, `verify` and `preview`: named and refused, and no file elsewhere is read."""

import io
import json
import tarfile

import numpy as np
import pytest

from avprep.account import settle
from avprep.datasets.source import Listing
from avprep.errors import AvprepError
from avprep.logmel import stored_log_mel
from avprep.shards import read_at, read_index, read_samples
from avprep.spec import ClipSpec


@pytest.fixture
def folder(tmp_path):
    """A split without a clip."""
    settle(tmp_path, "folder", "train", ClipSpec(), Listing(["a"]), [], ("0", "0"))
    return tmp_path


def _changed(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


_ENTRY = {"url": "a.tar", "nsamples": 1, "filesize": 1, "sha256": "0"}


@pytest.mark.parametrize(("change", "message"), [
    *((lambda index, url=url: index["shardlist"].append(_ENTRY | {"url": url}), "is no file beside it") for url in (
        "../secret.tar", "/etc/passwd", "a/b", "..", "", ".build", "a\0b", "a\nb", 5, None)),
    (lambda index: index["manifest"].append(_ENTRY | {"url": "../../x"}), "is no file beside it"),
    (lambda index: index["shardlist"].append(5), "is no file beside it"),
    (lambda index: index["shardlist"].append(_ENTRY | {"filesize": float("nan")}), "no size or checksum"),
    (lambda index: index["shardlist"].append(_ENTRY | {"nsamples": -1}), "no number of clips"),
    (lambda index: index.update(counts=5), "no counts"),
    (lambda index: index["counts"].pop("clips"), "no counts.clips"),
    (lambda index: index["counts"].update(marks={"a": "b"}), "counts.marks has no numbers"),
    (lambda index: index["counts"].update(clips_per_class=[1, 2, 3]), "other classes than it has"),
    (lambda index: index.update(classes=[[1]]), "a class is no name"),
    (lambda index: index["spec"].update(fps="x"), "its spec is none"), (lambda index: index.pop("spec"), "no spec")])
def test_an_index_that_claims_what_can_not_be(folder, avprep, change, message):
    _changed(folder, change)
    for command in ("info", "verify", "preview"):
        done = avprep(command, folder, *(("-o", folder / "a.png") if command == "preview" else ()))
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        [line] = done.stderr.splitlines()
        assert f"index.json is damaged: {message}" in line or message in line


def test_an_index_that_is_right_is_read(folder, avprep):
    assert avprep("info", folder).returncode == avprep("verify", folder).returncode == 0


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\0", "[]", "null"])
def test_an_index_that_is_none(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(AvprepError, match="is not a"):
        read_index(tmp_path / "index.json")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE,
                                  tarfile.GNUTYPE_SPARSE])
def test_a_member_that_is_no_plain_file(tmp_path, kind):
    info = tarfile.TarInfo("a.mp4")
    info.type, info.linkname = kind, "/etc/passwd"
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(AvprepError, match="its member 'a.mp4' is no plain file"):
        list(read_samples(tmp_path / "a.tar"))


def test_a_member_that_is_longer_than_its_shard(tmp_path):
    info = tarfile.TarInfo("a.mp4")
    info.size = 1 << 40
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(AvprepError, match="its member 'a.mp4' is longer than the shard"):
        list(read_samples(tmp_path / "a.tar"))
    for offset, size in ((-1, 5), (0, 1 << 60), (1 << 60, 1), (0, -1)):
        with pytest.raises(AvprepError, match="run `avprep verify`"):
            read_at(tmp_path / "a.tar", offset, size)


def test_a_log_mel_is_what_numpy_wrote_and_nothing_else():
    values = np.arange(160, dtype=np.float16).reshape(80, 2)
    for order in (values, np.asfortranarray(values)):
        file = io.BytesIO()
        np.save(file, order)
        assert np.array_equal(stored_log_mel(file.getvalue()), values)
        for wrong in (file.getvalue()[:-1], file.getvalue() + b"\0", b"", b"PK\x03\x04", b"\x80\x04N.",
                      file.getvalue().replace(b"(80, 2)", b"(-80, -2)"), file.getvalue().replace(b"'<f2'", b"'|O8'")):
            with pytest.raises(ValueError, match="its log-mel"):
                stored_log_mel(wrong)
