"""Shards read from start to end: the order, which every clip is in once; what is read of a store for it; clips for
anybody's own loop."""

import hashlib
import json
import shutil
from collections import Counter

import fsspec
import numpy as np
import pytest
import torch
from bad_proxy import bad_proxy
from small_eval import invoke
from torch.utils.data import DataLoader

import avtrain
from avtrain.config import read_config
from avtrain.data import storage, stream
from avtrain.data.clips import ClipDataset
from avtrain.data.order import ClipPlace, cut_of
from avtrain.data.shards import ShardReader, open_folders
from avtrain.data.stream import StreamReader, Streams, stream_order
from avtrain.errors import AvtrainError
from avtrain.pretraining.pretrain import epochs_of

CLIPS = [40, 3, 25, 60, 1, 31, 40]  # of shards
RUN = ("pretrain", "--preset", "sound", "--device", "cpu", "--set", "training.batch_size=4", "--set",
       "model.dimension=32", "--set", "data.order=stream", "--set", "data.stream_buffer=3")


@pytest.fixture(autouse=True)
def settings(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    monkeypatch.setenv("AVTRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(demo_shards):
    return open_folders([str(demo_shards / "train")])


@pytest.mark.parametrize(("ranks", "workers", "batch", "micro", "piece"), [
    (1, 1, 8, None, 1), (1, 3, 8, 4, 2), (2, 2, 24, 4, 3), (4, 5, 16, 2, 2), (2, 1, 300, None, 7)])
def test_every_clip_once_an_epoch_and_each_stream_by_its_shards(ranks, workers, batch, micro, piece):
    streams = Streams(cut_of(batch, micro, 0, ranks), piece, workers)
    everything = Counter(ClipPlace(shard, position) for shard, clips in enumerate(CLIPS) for position in range(clips))
    count, orders = sum(CLIPS), []
    for epoch in range(3):
        order = stream_order(CLIPS, 7, epoch, streams, 10)
        assert Counter(order) == everything and order == stream_order(CLIPS, 7, epoch, streams, 10)
        shown_by = streams.of(np.arange(epoch * count, (epoch + 1) * count))
        opened = [{place.shard for place, stream in zip(order, shown_by, strict=True) if stream == number}
                  for number in range(streams.count)]
        # Runs of the list of all shards: two neighbours may share one, and there are no other doubles.
        assert sum(map(len, opened)) <= len(CLIPS) + streams.count - 1
        orders.append(order)
    assert orders[0] != orders[1] and stream_order(CLIPS, 8, 0, streams, 10) != orders[0]


def test_the_streams_are_the_workers_that_torch_hands_pieces_to():
    """Process by process, part by part, piece by piece, in turn."""
    cut, workers, piece = cut_of(24, 6, 0, 2), 3, 4  # two parts a batch, in each of which a rank has 6 clips: 4 and 2
    wanted, handed = [], [0, 0]
    for _part in range(4):
        for rank in range(2):
            for size in (4, 2):
                wanted += [rank * workers + handed[rank] % workers] * size
                handed[rank] += 1
    assert Streams(cut, piece, workers).of(np.arange(48)).tolist() == wanted


def test_clips_are_shuffled_among_as_many_as_are_kept():
    streams = Streams(cut_of(8, None), 1, 1)
    order = stream_order([1000], 0, 0, streams, 50)
    assert max(at - place.position for at, place in enumerate(order)) > 50  # some stay long
    assert max(place.position - at for at, place in enumerate(order)) <= 100  # none is read much before it is needed
    assert [place.position for place in order] != list(range(1000))


@pytest.mark.parametrize("room", [1, 3, 100])
def test_the_reader_gives_what_the_shards_hold_however_few_clips_it_keeps(folder, room):
    streams, reader, exact = Streams(cut_of(2, None), 1, 2), StreamReader(folder, room), ShardReader(folder)
    for epoch in range(2):
        for place in stream_order(folder.clips_of_shards, 0, epoch, streams, 4):
            for modality in ("both", "audio") if place.shard == 3 else ("visual",):
                assert reader.read(*place, modality) == exact.read(*place, modality)


@pytest.fixture(scope="module")
def built(small_demo, avprep, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    done = avprep("build", "--dataset", "demo", "--raw", small_demo, "--out", out, "--split", "train")
    assert done.returncode == 0, done.stderr
    return out / "demo" / "train"


@pytest.fixture
def one_shard(built, tmp_path):
    """The same ten clips in one shard; a copy to do anything with."""
    return shutil.copytree(built, tmp_path / "one")


def test_a_shard_of_a_store_is_read_once_from_start_to_end_whatever_breaks(bucket, s3_server, one_shard, monkeypatch):
    for path in one_shard.iterdir():
        if path.is_file():
            bucket.pipe_file(f"bucket/one/{path.name}", path.read_bytes())
    monkeypatch.setattr(storage, "_RANGE_BYTES", 1 << 17)
    exact = ShardReader(open_folders([str(one_shard)]))
    with bad_proxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        fsspec.filesystem("s3").clear_instance_cache()
        folder = open_folders(["s3://bucket/one"])
        reader, order = StreamReader(folder, 100), stream_order([10], 0, 0, Streams(cut_of(2, None), 1, 1), 4)
        proxy.of, proxy.faults = "GET /bucket/one/train", [503, "half", "reset"]
        proxy.seen.clear()
        assert [reader.read(*place) for place in order] == [exact.read(*place) for place in order]
        ranges = -(-folder.shards[0].size // (1 << 17))
        assert proxy.faults == [] and len(proxy.seen) == ranges + 3
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_server_without_ranges_sends_all_of_it_again(one_shard, folder, monkeypatch):
    """Of which nothing is read twice by whoever reads the stream."""
    whole = next(one_shard.glob("*.tar")).read_bytes()
    there, sent = open_folders([str(one_shard)]), []

    def blocks(address, first=0, size=None, from_start=lambda: None):
        sent.append(first)
        if first:
            from_start()
        for at in range(0, len(whole), 100_000):
            if at > 300_000 and len(sent) < 3:
                raise storage.Passing("broke off")
            yield whole[at:at + 100_000]

    monkeypatch.setattr("avtrain.data.stream.blocks", blocks)
    monkeypatch.setattr("avtrain.data.stream.is_remote", lambda url: True)
    reader, exact = StreamReader(there, 100), ShardReader(there)
    assert [reader.read(0, number) for number in range(10)] == [exact.read(0, number) for number in range(10)]
    assert sent == [0, 400_000, 400_000]


def test_a_shard_is_opened_once_an_epoch_and_bytes_are_asked_for_only_where_a_clip_had_to_go(one_shard, monkeypatch):
    folder, opened, parts = open_folders([str(one_shard)]), [], []
    exact, samples, part = ShardReader(folder), stream.samples, stream._part
    monkeypatch.setattr(stream, "samples", lambda shards: opened.append(1) or samples(shards))
    monkeypatch.setattr(stream, "_part", lambda *where: parts.append(1) or part(*where))

    def opened_and_asked(reader, positions):
        opened.clear(), parts.clear()
        assert [reader.read(0, number) for number in positions] == [exact.read(0, number) for number in positions]
        return len(opened), len(parts)

    reader = StreamReader(folder, 10)
    assert opened_and_asked(reader, [2, 0, 4, 3]) == (1, 0)  # another worker has the rest
    assert opened_and_asked(reader, [*range(10)]) == (1, 0)
    assert opened_and_asked(reader, [9, *range(9)]) == (1, 0)
    assert opened_and_asked(StreamReader(folder, 2), [5, 0, 4, 6]) == (1, 2)  # of 0, pictures and sound


def test_streams_need_no_cache(demo_shards, tmp_path):
    for path in (demo_shards / "train").iterdir():
        if path.is_file():
            fsspec.filesystem("memory").pipe_file(f"/streamed/{path.name}", path.read_bytes())
    done = invoke(*RUN, "--shards", "memory://streamed", "--set", "data.workers=0", "--max-steps", 2, "--out",
                  tmp_path / "run")
    assert done.exit_code == 0 and not (tmp_path / "cache").exists(), done.output


def test_what_is_damaged_is_said_in_a_line(one_shard):
    folder = open_folders([str(one_shard)])
    [shard] = one_shard.glob("*.tar")
    content = shard.read_bytes()
    damaged = bytearray(content)
    damaged[-5] ^= 1
    for there, message in ((bytes(damaged), "its checksum is not the one in its index"),
                           (b"no tar" * 1000, "can't be read as a tar|its checksum"),
                           (content[:100_000], "train-000000.tar")):
        shard.write_bytes(there)
        with pytest.raises(AvtrainError, match=message) as caught:
            for number in range(10):
                StreamReader(folder, 100).read(0, number)
        assert "\n" not in str(caught.value) and shard.name in str(caught.value)
    shard.unlink()
    with pytest.raises(AvtrainError, match="can't be read: No such file"):
        StreamReader(folder, 100).read(0, 0)


def test_a_run_goes_on_to_the_same_losses_and_only_with_the_same_workers(demo_shards, tmp_path):
    shards = ("--shards", demo_shards / "train", "--set", "data.workers=2", "--set", "training.log_every=1")
    done = invoke(*RUN, *shards, "--out", tmp_path / "whole", "--max-steps", 6)
    assert done.exit_code == 0, done.output
    assert "data.order=stream: shuffled within each worker" in done.output
    for steps in (3, 6):
        assert invoke(*RUN, *shards, "--out", tmp_path / "cut", "--max-steps", steps).exit_code == 0
    whole, cut = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
                  for name in ("whole", "cut"))
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (whole, cut)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    done = invoke(*RUN, *shards, "--out", tmp_path / "cut", "--max-steps", 7, "--set", "data.workers=1")
    assert done.exit_code == 1 and "was begun with other settings" in done.output and "streams" in done.output


def test_two_processes_read_shards_of_their_own_take_equal_steps_and_show_every_clip_once_a_pass(folder, monkeypatch):
    """Counted by what the loaders of both give, over two passes that no batch ends with."""
    config = read_config("sound", ["training.batch_size=4", "data.order=stream", "data.stream_buffer=3",
                                   "data.workers=0"])
    shard_of = {row.key: row.place.shard for row in folder.rows}
    monkeypatch.setattr("avtrain.ranks.ranks", lambda: 2)
    seen = []
    for rank in range(2):
        monkeypatch.setattr("avtrain.ranks.rank", lambda rank=rank: rank)
        supply = epochs_of(ClipDataset(folder, config.data, 0), config).starting_at(0)
        seen.append([next(supply).keys for _ in range(5)])
    assert all(len(keys) == 2 for of_rank in seen for keys in of_rank)
    line = [(key, rank) for step in zip(*seen, strict=True) for rank, keys in enumerate(step) for key in keys]
    for one_pass in (line[:10], line[10:]):
        assert sorted(key for key, _ in one_pass) == sorted(shard_of)
        opened = {(shard_of[key], rank) for key, rank in one_pass}
        assert len(opened) <= len(folder.shards) + 1  # the two may share one


@pytest.mark.slow
def test_clips_for_anybodys_loop(demo_shards, folder):
    exact = {row.key: row for row in folder.rows}
    found = list(avtrain.clips(str(demo_shards / "train")))
    assert [clip.key for clip in found] == [row.key for row in folder.rows]
    for clip in found:
        row = exact[clip.key]
        assert clip.info["labels"] == row.labels and clip.log_mel.shape == (80, row.mel_frames)
        assert clip.visual.shape == (row.frames, clip.info["height"], clip.info["width"], 3)
        assert clip.visual.dtype == np.uint8
    one, other = ([clip.key for clip in avtrain.clips([str(demo_shards / "train")], shuffle=5, seed=seed)]
                  for seed in (1, 2))
    assert one != other and sorted(one) == sorted(other) == sorted(exact)
    loader = DataLoader(avtrain.clips(str(demo_shards / "train")), batch_size=None, num_workers=2)
    assert sorted(clip.key for clip in loader) == sorted(exact)


def test_a_clip_that_can_not_be_decoded_is_left_out_with_a_warning(one_shard, tmp_path):
    [shard] = one_shard.glob("*.tar")
    row = open_folders([str(one_shard)]).rows[4]
    member = open_folders([str(one_shard)]).rows.members(row.place)["mp4"]
    content = bytearray(shard.read_bytes())
    content[member.offset:member.offset + member.size] = bytes(member.size)
    shard.write_bytes(content)
    index = json.loads((one_shard / "index.json").read_text())
    index["shardlist"][0]["sha256"] = hashlib.sha256(content).hexdigest()
    (one_shard / "index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="its video can't be decoded"):
        assert len(list(avtrain.clips(str(one_shard)))) == 9
    shutil.rmtree(one_shard)
    with pytest.raises(AvtrainError, match="no .*index.json"):
        avtrain.clips(str(one_shard))


def test_clips_of_two_processes_are_different_ones(demo_shards, monkeypatch):
    found = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        found += [clip.key for clip in avtrain.clips(str(demo_shards / "train"))]
    assert len(found) == len(set(found)) == 10 and not torch.distributed.is_initialized()
