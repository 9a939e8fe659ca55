"""The shards are read by what people have: webdataset, tarfile with PyAV, a torch DataLoader. Never by our own code."""

import gc
import hashlib
import io
import json
import shutil
import tarfile
from itertools import islice

import av
import numpy as np
import pytest
import torch
import webdataset

# webdataset leaves its shards open until they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    """Collect what webdataset left open within the test that may ignore it."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def shards(demo_shards):
    return demo_shards / "train"


def _urls(shards):
    return [str(shards / entry["url"]) for entry in json.loads((shards / "index.json").read_text())["shardlist"]]


def test_plain_webdataset(shards):
    samples = list(webdataset.WebDataset(_urls(shards), shardshuffle=False).decode())
    assert len(samples) == 10 and len({sample["__key__"] for sample in samples}) == 10
    for sample in samples:
        assert set(sample) >= {"mp4", "logmel.npy", "json"}
        assert sample["logmel.npy"].shape == (80, 1920) and sample["logmel.npy"].dtype == np.float16
        assert sample["json"]["key"] == sample["__key__"] and sample["json"]["frames"] == 480


def test_tars_are_complete_by_themselves(shards, tmp_path):
    """Neither the index nor the tables are there."""
    tars = [shutil.copy(url, tmp_path) for url in _urls(shards)]
    assert len(list(webdataset.WebDataset(tars, shardshuffle=False).decode())) == 10
    for path in tars:
        with tarfile.open(path) as tar:
            assert [name.partition(".")[2] for name in tar.getnames()] == ["json", "logmel.npy", "mp4"]
            assert {(member.uname, member.gname, member.uid, member.gid, member.mtime, member.mode)
                    for member in tar} == {("", "", 0, 0, 0, 0o644)}


def test_index_describes_the_shards(shards):
    """Its `shardlist` is laid out like webdataset's own shard index (url, nsamples, filesize), plus a checksum."""
    index = json.loads((shards / "index.json").read_text())
    assert (index["__kind__"], index["wids_version"]) == ("wids-shard-index-v1", 1)
    total = 0
    for entry in index["shardlist"]:
        content = (shards / entry["url"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["filesize"], entry["sha256"])
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            assert len({name.split(".")[0] for name in tar.getnames()}) == entry["nsamples"]
        total += entry["nsamples"]
    assert total == index["counts"]["clips"] == 10
    assert index["counts"]["seconds"] == 300 and index["spec"]["hop_samples"] == 690


def test_tarfile_and_pyav_alone_decode_one_segment(shards):
    """A keyframe stands at each segment's start, so decoding may begin there and gives the same pictures."""
    with tarfile.open(_urls(shards)[0]) as tar:
        name = next(name for name in tar.getnames() if name.endswith(".mp4"))
        mp4 = tar.extractfile(name).read()
        assert all(member.mtime == 0 and member.uid == 0 and member.isfile() for member in tar)
    with av.open(io.BytesIO(mp4)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate, stream.pix_fmt) == ("h264", 16, "yuv420p")
        assert len(container.streams) == 1
        whole = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(whole) == 480
    for segment in (1, 7, 14):
        with av.open(io.BytesIO(mp4)) as container:
            stream = container.streams.video[0]
            container.seek(round(segment * 2 / stream.time_base), stream=stream)
            alone = [frame.to_ndarray(format="rgb24") for frame in islice(container.decode(stream), 32)]
        assert np.array_equal(np.stack(alone), np.stack(whole[32 * segment:32 * segment + 32]))


def test_torch_dataloader_with_two_workers(shards):
    dataset = webdataset.WebDataset(_urls(shards), shardshuffle=False).decode().to_tuple("__key__", "logmel.npy")
    batches = list(torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2))
    assert sorted(key for keys, _ in batches for key in keys) == sorted(
        sample["__key__"] for sample in webdataset.WebDataset(_urls(shards), shardshuffle=False))
    assert all(mels.shape[1:] == (80, 1920) for _, mels in batches)
