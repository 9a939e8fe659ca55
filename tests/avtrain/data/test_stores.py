"""Shards in stores: a real S3 server on loopback, fsspec's memory for the stores that can't be tried here; the cache
that all processes share, and what is fetched ahead."""

import hashlib
import json
import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from bad_proxy import bad_proxy
from filelock import FileLock
from small_eval import invoke

from avtrain.data import cache, storage
from avtrain.data.ahead import fetched_ahead
from avtrain.data.shards import Shard, ShardReader, open_folders
from avtrain.errors import AvtrainError


@pytest.fixture
def s3(bucket, monkeypatch, tmp_path):
    """The store of an empty bucket; waiting is short, the cache empty."""
    monkeypatch.setenv("AVTRAIN_CACHE", str(tmp_path / "cache"))
    for name in ("AVTRAIN_CACHE_GB", "AVTRAIN_STORAGE_OPTIONS"):  # what a command puts there ends with the test
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    return bucket


def _cached(tmp_path):
    return {path.stem for path in (tmp_path / "cache").glob("*.tar")}


def _read_all(folder):
    reader = ShardReader(folder)
    return [reader.read(*row.place) for row in folder.rows]


def _into(store, folder: Path, place: str):
    for path in folder.iterdir():
        if path.is_file():
            store.pipe_file(f"{place}/{path.name}", path.read_bytes())


def test_shards_are_read_from_s3(s3, demo_shards):
    _into(s3, demo_shards / "train", "bucket/shards/demo/train")
    there, here = open_folders(["s3://bucket/shards/demo/train"]), open_folders([str(demo_shards / "train")])
    assert there.fingerprint == here.fingerprint and list(there.rows) == list(here.rows)
    assert _read_all(there) == _read_all(here)
    s3.rm_file("bucket/shards/demo/train/train-000003.tar")
    assert _read_all(open_folders(["s3://bucket/shards/demo/train/"])) == _read_all(here)  # from the cache


def test_what_is_wrong_in_s3_is_said_in_a_line(s3, demo_shards, monkeypatch, tmp_path):
    for place, message in (("bucket/none", "s3://bucket/none/index.json: is not there: is the address right"),
                           ("nobucket/a", "s3://nobucket/a/index.json: is not there")):
        with pytest.raises(AvtrainError, match=message):
            open_folders([f"s3://{place}"])
    _into(s3, demo_shards / "train", "bucket/t")
    folder = open_folders(["s3://bucket/t"])
    content = s3.cat_file("bucket/t/train-000000.tar")
    s3.pipe_file("bucket/t/train-000001.tar", content[:5000])
    s3.rm_file("bucket/t/train-000002.tar")
    damaged = bytearray(content)
    damaged[700] ^= 1
    s3.pipe_file("bucket/t/train-000000.tar", bytes(damaged))
    for shard, message in ((0, "train-000000.tar: its checksum is not the one in its index, at two tries"),
                           (1, "train-000001.tar: is shorter than the .* bytes that its index says, at two tries"),
                           (2, "train-000002.tar: is not there")):
        with pytest.raises(AvtrainError, match=message) as caught:
            ShardReader(folder).read(shard, 0)
        assert "\n" not in str(caught.value) and str(caught.value).startswith("s3://bucket/t/train-00000")
    assert _cached(tmp_path) == set() and not list((tmp_path / "cache").glob("*.part"))


def test_storage_options_are_handed_to_the_store(s3, s3_server, demo_shards, monkeypatch, tmp_path):
    _into(s3, demo_shards / "test", "bucket/t")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    options = {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": s3_server}}
    done = invoke("pretrain", "--shards", "s3://bucket/t", "--preset", "sound", "--max-steps", 1, "--device", "cpu",
                  "--set", "data.workers=0", "--set", "training.batch_size=2", "--set", "model.dimension=32", "--out",
                  tmp_path / "run", "--storage-options", json.dumps(options))
    assert done.exit_code == 0, done.output
    for wrong, message in (("{", "--storage-options: not JSON"), ("[]", "an object is wanted"),
                           ('{"colour": 1}', "colour")):
        monkeypatch.setenv("AVTRAIN_STORAGE_OPTIONS", wrong)
        with pytest.raises(AvtrainError, match=message) as caught:
            open_folders(["s3://bucket/t"])
        assert "\n" not in str(caught.value)


def test_a_run_from_an_s3_server_that_misbehaves_fetches_each_shard_once(s3, s3_server, demo_shards, monkeypatch,
                                                                         tmp_path):
    """Answers of 503, connections that break or are cut in the middle, slowness; two workers and the process beside
    them share what is fetched."""
    _into(s3, demo_shards / "train", "bucket/t")
    with bad_proxy(s3_server) as proxy:
        proxy.of, proxy.faults = "GET /bucket/t/train", [503, "reset", "half", 0.3, "half"]
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        fsspec.filesystem("s3").clear_instance_cache()
        done = invoke("pretrain", "--shards", "s3://bucket/t", "--preset", "sound", "--max-steps", 6, "--device", "cpu",
                      "--set", "data.workers=2", "--set", "training.batch_size=4", "--set", "model.dimension=32",
                      "--set", "data.shards_at_once=3", "--out", tmp_path / "run", "--cache-gb", 1)
        assert done.exit_code == 0 and proxy.faults == [], done.output
        fetched = Counter(path for _, path in proxy.seen if path.endswith(".tar"))
        assert len(fetched) == 10 and fetched.total() == 10 + 4  # those that went wrong, but for the slow one
        proxy.of, proxy.faults = "GET /bucket/t/index", [503] * 999
        monkeypatch.setenv("AVTRAIN_STORAGE_OPTIONS", '{"config_kwargs": {"retries": {"max_attempts": 0}}}')
        with pytest.raises(AvtrainError, match="s3://bucket/t/index.json: .*; given up after 5 tries") as caught:
            open_folders(["s3://bucket/t"])
        assert "\n" not in str(caught.value)
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_store_of_another_kind_and_one_that_nobody_knows(demo_shards, monkeypatch, tmp_path):
    """gs:// and hf:// go the way of memory://, which is all of it that can be tried without their servers."""
    monkeypatch.setenv("AVTRAIN_CACHE", str(tmp_path / "cache"))
    _into(fsspec.filesystem("memory"), demo_shards / "test", "/a/test")
    here = open_folders([str(demo_shards / "test")])
    assert _read_all(open_folders(["memory://a/test"])) == _read_all(here)
    assert _read_all(open_folders([f"file://{demo_shards / 'test'}"])) == _read_all(here)
    with pytest.raises(AvtrainError, match="memory://b/index.json: is not there"):
        open_folders(["memory://b"])
    with pytest.raises(AvtrainError, match="nostore://b/index.json: Protocol not known"):
        open_folders(["nostore://b"])


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """Five shards of 1 MB in memory, each filled with its number."""
    monkeypatch.setenv("AVTRAIN_CACHE", str(tmp_path / "cache"))
    shards = []
    for number in range(5):
        content = bytes([number]) * 1_000_000
        fsspec.filesystem("memory").pipe_file(f"/s/{number}.tar", content)
        shards.append(Shard(f"memory://s/{number}.tar", 1, len(content), hashlib.sha256(content).hexdigest()))
    return shards


def _opened(shard):
    with cache.opened(shard.url, shard.size, shard.sha256) as file:
        return file.read(1)[0]


def test_what_was_used_longest_ago_goes(stored, monkeypatch, tmp_path):
    monkeypatch.setenv("AVTRAIN_CACHE_GB", "0.0031")
    for number in (0, 1, 2, 0, 3):  # 0 was used again since 1
        assert _opened(stored[number]) == number
        time.sleep(0.01)
    assert _cached(tmp_path) == {stored[number].sha256 for number in (0, 2, 3)}
    with cache.opened(stored[0].url, stored[0].size, stored[0].sha256) as file:
        for number in (1, 2, 3, 4):
            _opened(stored[number])
        assert file.read() == bytes(1_000_000)  # removed, and still read by who has it open
    assert _cached(tmp_path) == {stored[number].sha256 for number in (2, 3, 4)}


def test_what_a_killed_process_left_goes_too_and_what_is_being_fetched_stays(stored, monkeypatch, tmp_path):
    monkeypatch.setenv("AVTRAIN_CACHE_GB", "0.0021")
    (tmp_path / "cache" / "locks").mkdir(parents=True)
    for number in (4, 3):  # the older one is being fetched
        (tmp_path / "cache" / f"{stored[number].sha256}.part").write_bytes(bytes(600_000))
    with FileLock(tmp_path / "cache" / "locks" / f"{stored[4].sha256}.lock"):
        _opened(stored[0])
        assert [path.stem for path in (tmp_path / "cache").glob("*.part")] == [stored[4].sha256]


def test_without_a_limit_a_share_of_the_disk_is_left_free(stored, monkeypatch, tmp_path):
    free = [10_000_000]
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(total=50_000_000, free=free[0]))
    _opened(stored[0])
    time.sleep(0.01)
    _opened(stored[1])
    assert len(_cached(tmp_path)) == 2
    free[0] = 5_500_000
    _opened(stored[2])
    assert _cached(tmp_path) == {stored[number].sha256 for number in (1, 2)}


def test_limits_that_can_not_be(stored, monkeypatch):
    monkeypatch.setenv("AVTRAIN_CACHE_GB", "0.0005")
    with pytest.raises(AvtrainError, match="a shard has 0.001 GB, and --cache-gb allows 0.0005"):
        _opened(stored[0])
    with pytest.raises(AvtrainError, match="shuffled among 2 shards, which have 0.002 GB: allow twice that"):
        cache.check_limit([shard.size for shard in stored], 2)
    for wrong in ("much", "0", "nan", "-1"):
        monkeypatch.setenv("AVTRAIN_CACHE_GB", wrong)
        with pytest.raises(AvtrainError, match=f"AVTRAIN_CACHE_GB is {wrong}: a number"):
            _opened(stored[0])


def _items(shards):
    return [[((shard, 0), 0)] for shard in shards]


def test_shards_are_fetched_before_their_turn_comes(stored, monkeypatch, tmp_path):
    """As far ahead as half of the cache is large; the items are what they were, in order."""
    monkeypatch.setenv("AVTRAIN_CACHE_GB", "0.004")
    wanted = _items([0, 0, 1, 2, 3, 4, 0])
    supply = fetched_ahead(iter(wanted), stored)
    first = next(supply)
    deadline = time.monotonic() + 10
    while len(_cached(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert _cached(tmp_path) == {stored[number].sha256 for number in (0, 1)}  # of which only 0 was asked for
    assert [first, *supply] == wanted
    assert multiprocessing.active_children() == []


def test_the_process_that_fetches_ends_with_the_supply_and_may_be_killed(stored):
    supply = fetched_ahead(iter(_items([0, 1, 2, 3, 4] * 3)), stored)
    next(supply)
    [process] = multiprocessing.active_children()
    os.kill(process.pid, 9)
    process.join()
    assert len(list(supply)) == 14
    supply = fetched_ahead(iter(_items([0, 1, 2, 3, 4])), stored)
    next(supply)
    supply.close()
    assert multiprocessing.active_children() == []


def test_local_shards_need_no_process(stored):
    local = [Shard(f"/s/{number}.tar", 1, 1, "") for number in range(5)]
    supply = fetched_ahead(iter(_items([0, 1])), local)
    assert next(supply) == _items([0])[0] and multiprocessing.active_children() == []
