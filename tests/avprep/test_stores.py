"""Builds from and into stores: a real S3 server on loopback, and stores that misbehave. The bytes are those of a build
between folders of this machine, whatever goes wrong on the way."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
from bad_proxy import bad_proxy
from fsspec.implementations.memory import MemoryFileSystem

from avprep import lease, storage
from avprep.errors import AvprepError
from avprep.state import WHOLE, Part
from avprep.storage import Store

OPTIONS = ("--dataset", "folder", "--split", "train", "--shard-mb", 0.01, "--workers", 2)


@pytest.fixture(scope="module")
def raw(short_video, short_sound, tmp_path_factory):
    """Five files, of which one is none, a list, and a folder of classes. To be read only."""
    folder = tmp_path_factory.mktemp("stores") / "raw"
    for number, source in enumerate((short_video, short_sound, short_video, short_video)):
        place = folder / "train" / f"class {number % 2}" / f"{number} ü{source.suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, place)
    (folder / "train" / "class 1" / "bad.mp4").write_bytes(b"no video" * 100)
    return folder


@pytest.fixture(scope="module")
def built(raw, avprep):
    """What a build between folders makes of it."""
    done = avprep("build", *OPTIONS, "--raw", raw, "--out", raw.parent / "here")
    assert done.returncode == 0, done.stderr
    return _files(raw.parent / "here" / "folder" / "train"), done.stdout


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)


def _files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def _stored(store, place):
    store.invalidate_cache()
    return {path.rpartition("/")[2]: store.cat_file(path) for path, info in store.find(place, detail=True).items()
            if "/.build/" not in path}


def _put(store, folder, place):
    for path in Path(folder).rglob("*"):
        if path.is_file():
            store.pipe_file(f"{place}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def _said(text):
    """What was said of a build, without places and times."""
    return [line for line in text.splitlines() if not line.startswith("  ") or "clips," in line]


def test_from_s3_to_s3_and_again(bucket, raw, built, avprep, monkeypatch, tmp_path):
    files, said = built
    _put(bucket, raw, "bucket/raw")
    command = ("build", *OPTIONS, "--raw", "s3://bucket/raw", "--out", "s3://bucket/shards")
    done = avprep(*command)
    assert done.returncode == 0, done.stderr
    assert _stored(bucket, "bucket/shards/folder/train") == files and len(files) >= 6
    assert _said(done.stdout) == _said(said) and "s3://bucket/shards/folder/train/index.json" in done.stdout
    before = {path: info["LastModified"] for path, info in bucket.find("bucket/shards", detail=True).items()}
    again = avprep(*command)
    assert "all shards were there already" in again.stdout
    assert {path: info["LastModified"] for path, info in bucket.find("bucket/shards", detail=True).items()} == before
    assert not [path for path in before if "lease" in path or path.endswith((".part", "/lock"))]
    folder = raw.parent / "here"
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for command in (("info",), ("info", "--json"), ("verify",), ("verify", "--against", raw)):
        there, here = (avprep(command[0], place, *command[1:]) for place in ("s3://bucket/shards/", folder))
        assert there.returncode == here.returncode == 0, there.stderr
        assert there.stdout == here.stdout.replace(str(folder), "s3://bucket/shards")
    pictures = [tmp_path / "there.png", tmp_path / "here.png"]
    for place, picture in zip(("s3://bucket/shards/folder/train/index.json", folder), pictures, strict=True):
        assert avprep("preview", place, "-o", picture, "--clips", 3).stdout.startswith("3 clips drawn")
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.slow
def test_what_is_wrong_with_shards_in_a_store_is_said_of_the_store(bucket, raw, built, avprep):
    _put(bucket, raw.parent / "here", "bucket/shards")
    place = "bucket/shards/folder/train"
    first, second, *_ = sorted(name for name in built[0] if name.endswith(".tar"))
    bucket.rm_file(f"{place}/{first}")
    bucket.pipe_file(f"{place}/{second}", built[0][second][:-600] + b"!" + built[0][second][-599:])
    done = avprep("verify", "s3://bucket/shards")
    assert done.returncode == 1 and f"s3://{place}/{first}: missing" in done.stdout
    assert f"s3://{place}/{second}: its checksum differs from the index" in done.stdout
    bucket.rm_file(f"{place}/clips.parquet")
    for command, address, message in (
            ("info", "s3://bucket/shards", f"s3://{place}/clips.parquet can't be read"),
            ("preview", "s3://bucket/nothing", "no files at s3://bucket/nothing: is the address right?"),
            ("verify", "nostore://x", "Protocol not known: nostore"),
            ("verify", "s3://bucket/shards/folder/train/failures.jsonl", "is the address right?")):
        done = avprep(command, address)
        assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_what_is_gone_or_changed_in_the_store_is_made_anew_and_only_that(bucket, raw, built, avprep):
    files, _ = built
    _put(bucket, raw, "bucket/raw")
    command = ("build", *OPTIONS, "--raw", "s3://bucket/raw", "--out", "s3://bucket/shards")
    place = "bucket/shards/folder/train"
    assert avprep(*command).returncode == 0
    first, second, *_ = sorted(name for name in files if name.endswith(".tar"))
    bucket.rm_file(f"{place}/{first}")
    bucket.pipe_file(f"{place}/{second}", files[second][:-512])
    bucket.pipe_file(f"{place}/train-000099.tar", b"of another build")
    done = avprep(*command)
    assert done.returncode == 0 and _stored(bucket, place) == files, done.stderr
    bucket.rm_file("bucket/raw/train/class 1/bad.mp4")
    done = avprep(*command)
    assert "4 files found = 4 written" in done.stdout, done.output
    assert "failures.jsonl" in _stored(bucket, place) and _stored(bucket, place)["failures.jsonl"] == b""


def test_from_a_store_to_here_and_from_here_to_a_store(bucket, raw, built, avprep, tmp_path):
    files, _ = built
    _put(bucket, raw, "bucket/raw")
    assert avprep("build", *OPTIONS, "--raw", "s3://bucket/raw/", "--out", tmp_path / "out").returncode == 0
    assert _files(tmp_path / "out" / "folder" / "train") == files
    assert avprep("build", *OPTIONS, "--raw", f"file://{raw}", "--out", "memory://shards").returncode == 0
    assert _stored(fsspec.filesystem("memory"), "/shards/folder/train") == files


@pytest.mark.parametrize("faults", [
    [0.5, "reset", 503, 503, "unsaid", "lost"], pytest.param([503] * 3, marks=pytest.mark.slow),
    pytest.param(["reset", "lost", "unsaid"], marks=pytest.mark.slow)])
def test_a_store_that_loses_uploads(bucket, s3_server, raw, built, avprep, monkeypatch, faults):
    """503, connections that break before or in the middle of an upload, or when it is there and not yet said so."""
    files, _ = built
    with bad_proxy(s3_server) as proxy:
        proxy.of, proxy.faults = "PUT /bucket/shards", list(faults)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        fsspec.filesystem("s3").clear_instance_cache()
        done = avprep("build", *OPTIONS, "--raw", raw, "--out", "s3://bucket/shards")
        assert done.returncode == 0 and proxy.faults == [], done.stderr
    assert _stored(bucket, "bucket/shards/folder/train") == files


def test_a_store_that_cuts_what_is_read(bucket, s3_server, raw, built, avprep, monkeypatch, tmp_path):
    files, _ = built
    _put(bucket, raw, "bucket/raw")
    with bad_proxy(s3_server) as proxy:
        proxy.of, proxy.faults = "GET /bucket/raw", ["half", 503, "reset", 0.3, "half"]
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        fsspec.filesystem("s3").clear_instance_cache()
        done = avprep("build", *OPTIONS, "--raw", "s3://bucket/raw", "--out", tmp_path / "out")
        assert done.returncode == 0 and proxy.faults == [], done.stderr
    assert _files(tmp_path / "out" / "folder" / "train") == files


@pytest.mark.slow
def test_a_store_that_stays_away_ends_the_run_in_a_line_and_it_goes_on_later(bucket, s3_server, raw, built, avprep,
                                                                             monkeypatch, tmp_path):
    files, _ = built
    raw = shutil.copytree(raw, tmp_path / "raw")
    once = '{"config_kwargs": {"retries": {"max_attempts": 0}}}'
    command = ("build", *OPTIONS, "--raw", raw, "--out", "s3://bucket/shards", "--workers", 1)
    with bad_proxy(s3_server) as proxy:
        proxy.of, proxy.faults = "PUT /bucket/shards/folder/train/train-000002", [503] * 999
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        fsspec.filesystem("s3").clear_instance_cache()
        done = avprep(*command, "--storage-options", once)
        assert done.returncode == 1 and "train-000002.tar: " in done.stderr and "given up after 5" in done.stderr
        assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith("Error: s3://bucket/shards")
        left = _stored(bucket, "bucket/shards/folder/train")
        assert left and set(left) < set(files) and all(files[name] == content for name, content in left.items())
        assert "index.json" not in left and "train-000002.tar" not in left
        noted = {f"{Path(path).stem}.tar" for path in bucket.find("bucket/shards") if "/.build/train" in path}
        assert noted  # of a shard whose tar had just arrived it may not be noted yet
        proxy.faults = []
        proxy.seen.clear()
        done = avprep(*command)
        assert done.returncode == 0, done.stderr
        anew = {path.rpartition("/")[2] for method, path in proxy.seen if method == "PUT" and path.endswith(".tar")}
        assert _stored(bucket, "bucket/shards/folder/train") == files and anew and not anew & noted
        # And while what an index describes changes, it is not there; of what is written last, it comes last.
        (raw / "train" / "class 0" / "0 ü.mp4").unlink()
        for of in ("PUT /bucket/shards/folder/train/train-", "PUT /bucket/shards/folder/train/clips"):
            proxy.of, proxy.faults = of, [503] * 999
            done = avprep(*command, "--storage-options", once)
            assert done.returncode == 1 and "given up after 5" in done.stderr
            assert "index.json" not in _stored(bucket, "bucket/shards/folder/train")
        proxy.faults = []
        assert avprep(*command).returncode == 0
    here = avprep("build", *OPTIONS, "--raw", raw, "--out", raw.parent / "there")
    assert here.returncode == 0
    assert _stored(bucket, "bucket/shards/folder/train") == _files(raw.parent / "there" / "folder" / "train")


class _Renaming(MemoryFileSystem):
    """A store whose uploads are seen as they grow, as on an ftp server; it breaks off some."""

    protocol = "renaming"
    store, pseudo_dirs, breaks, seen = {}, [""], [], []

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("renaming://", "memory://"))

    def put_file(self, lpath, rpath, **rest):
        self.seen.append(rpath)
        content = Path(lpath).read_bytes()
        fault = self.breaks.pop() if self.breaks and ".tar" in rpath else None
        self.pipe_file(rpath, content[:len(content) // 2] if fault else content)
        if fault == "broken off":
            raise ConnectionResetError(fault)

    def get_file(self, rpath, lpath, **rest):
        content = self.cat_file(rpath)
        Path(lpath).write_bytes(content[:len(content) // 2] if self.breaks and self.breaks.pop() else content)


def test_where_an_upload_is_seen_as_it_grows_a_file_gets_its_name_when_it_is_whole(raw, built, avprep):
    files, _ = built
    fsspec.register_implementation("renaming", _Renaming, clobber=True)
    _Renaming.breaks[:] = ["broken off", None, "cut in silence", "broken off"]
    done = avprep("build", *OPTIONS, "--raw", raw, "--out", "renaming://shards")
    assert done.returncode == 0, done.stderr
    assert _stored(fsspec.filesystem("renaming"), "/shards/folder/train") == files
    assert _Renaming.breaks == [] and all(path.endswith(".part") for path in _Renaming.seen)


def test_a_source_that_comes_cut_in_silence_is_fetched_again(raw, built, avprep, tmp_path):
    fsspec.register_implementation("renaming", _Renaming, clobber=True)
    _put(fsspec.filesystem("renaming"), raw, "/raw")
    _Renaming.breaks[:] = ["cut"] * 3
    done = avprep("build", *OPTIONS, "--raw", "renaming://raw", "--out", tmp_path / "out")
    assert done.returncode == 0 and _Renaming.breaks == [], done.stderr
    assert _files(tmp_path / "out" / "folder" / "train") == built[0]


def test_parts_are_merged_in_the_store(bucket, raw, built, avprep):
    files, _ = built
    for part in ("1/2", "2/2"):
        done = avprep("build", *OPTIONS, "--raw", raw, "--out", "s3://bucket/shards", "--part", part)
        assert done.returncode == 0, done.stderr
        if part == "1/2":
            done = avprep("merge", "s3://bucket/shards")
            assert done.returncode == 1 and "of s3://bucket/shards/folder/train: no part 2/2" in done.stderr
    assert "index.json" not in _stored(bucket, "bucket/shards/folder/train")
    done = avprep("merge", "s3://bucket/shards")
    assert done.returncode == 0 and "s3://bucket/shards/folder/train/index.json" in done.stdout, done.stderr
    assert _stored(bucket, "bucket/shards/folder/train") == files


def test_two_builds_into_one_folder_of_a_store(bucket, raw, avprep, monkeypatch):
    store = Store("s3://bucket/shards/folder/train")
    with lease.leased(store, WHOLE):
        for part in (WHOLE, Part(2, 3)):
            with pytest.raises(AvprepError, match="another avprep build is writing to s3://bucket/shards/folder/train "
                                                  r"\(process \d+ on .*\): wait for it"):
                lease.Lease(store, part).take()
        done = avprep("build", *OPTIONS, "--raw", raw, "--out", "s3://bucket/shards")
        assert done.returncode == 1 and "another avprep build is writing" in done.stderr
    with lease.leased(store, Part(1, 2)), lease.leased(store, Part(2, 2)):  # which share no shard
        pass
    assert bucket.find("bucket/shards") == []


def test_a_lease_is_renewed_and_one_of_a_killed_build_ends(bucket, monkeypatch):
    monkeypatch.setattr(lease, "RENEWED_S", 0.05)
    monkeypatch.setattr(lease, "EXPIRED_S", 0.5)
    store = Store("s3://bucket/a")
    with lease.leased(store, WHOLE) as ours:
        time.sleep(0.8)
        with pytest.raises(AvprepError, match="another avprep build"):
            lease.Lease(store, WHOLE).take()
        for _ in range(20):  # it may be renewed at just that moment
            bucket.pipe_file("bucket/a/.build/lease-1-of-1.json", json.dumps(
                {"id": "other", "part": [1, 1], "renewed_s": time.time(), "who": "one that was here"}).encode())
            time.sleep(0.1)
        with pytest.raises(AvprepError, match="another avprep build has taken over s3://bucket/a"):
            ours.check()
    time.sleep(0.5)
    with lease.leased(store, WHOLE):
        pass


def test_what_can_not_be_is_said_in_a_line(bucket, raw, avprep, tmp_path):
    raw_here = ("--raw", raw)
    for options, message in (
            (("--raw", "s3://bucket/none", "--out", tmp_path), "no files at s3://bucket/none (--raw)"),
            ((*raw_here, "--out", "s3://nobucket/x"), "s3://nobucket/x/folder/train"),
            ((*raw_here, "--out", "nostore://x"), "Protocol not known: nostore"),
            ((*raw_here, "--out", "s3://bucket/x", "--storage-options", "{"), "--storage-options: not JSON"),
            ((*raw_here, "--out", "s3://bucket/x", "--storage-options", "[]"), "an object is wanted")):
        done = avprep("build", *OPTIONS, *options)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
    done = avprep("merge", "s3://bucket/none", tmp_path)
    assert done.returncode == 1 and "are merged where they lie" in done.stderr


def test_names_that_no_file_can_have_are_in_the_account(bucket, raw, avprep):
    _put(bucket, raw, "bucket/raw")
    bucket.pipe_file("bucket/raw/train/class 1/../../../../evil.mp4", b"x")
    bucket.pipe_file(f"bucket/raw/train/{'n' * 300}.mp4", b"x")
    bucket.pipe_file("bucket/raw/train/class 1/bad.mp4/inside.mp4", b"x")
    done = avprep("build", *OPTIONS, "--raw", "s3://bucket/raw", "--out", "s3://bucket/shards")
    assert done.returncode == 0 and "3 (3 a name that no file can have) skipped" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_build_that_is_ended_is_gone_on_with(bucket, raw, built, avprep, monkeypatch, tmp_path, how):
    files, _ = built
    command = ["build", *map(str, OPTIONS), "--raw", str(raw), "--out", "s3://bucket/shards", "--workers", "1"]
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # one that is killed leaves something there
    process = subprocess.Popen([sys.executable, "-m", "avprep.cli", *command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not [path for path in bucket.find("bucket/shards") if path.endswith(".tar")] and time.monotonic() < deadline:
        bucket.invalidate_cache()
        time.sleep(0.01)
    process.send_signal(how)
    _, errors = process.communicate(timeout=30)
    left = _stored(bucket, "bucket/shards/folder/train")
    assert left and all(files[name] == content for name, content in left.items()), errors
    if how == signal.SIGKILL:
        done = avprep(*command)
        assert done.returncode == 1 and "another avprep build is writing" in done.stderr
        monkeypatch.setattr(lease, "EXPIRED_S", 0.0)
    else:
        assert process.returncode == 130 and "run the same command again to go on" in errors
        assert not list(tmp_path.glob("avprep-*"))
    done = avprep(*command)
    assert done.returncode == 0 and _stored(bucket, "bucket/shards/folder/train") == files, done.stderr


def test_of_builds_that_begin_at_the_same_moment_one_gets_the_lease(bucket):
    for number in range(2):
        store, won = Store(f"s3://bucket/race{number}"), []

        def take(store=store, won=won):
            one = lease.Lease(store, WHOLE)
            with suppress(AvprepError):
                one.take()
                won.append(one)

        threads = [threading.Thread(target=take) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].give_back()
