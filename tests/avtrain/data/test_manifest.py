"""The manifest: what it says is what stands in the tars; what it can't rightly say is refused in a line."""

import gc
import io
import json
import pickle
import shutil
import tarfile

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from manifest_of import SCHEMA, table_of
from small_eval import invoke

from avtrain.config import DataConfig
from avtrain.data.clips import ClipDataset
from avtrain.data.manifest import schema
from avtrain.data.order import ClipPlace
from avtrain.data.shards import ShardReader, open_folders
from avtrain.errors import AvtrainError
from avtrain.transfer.splits import usable_clips
from benchmarks.manifest import listed, make_folder


@pytest.fixture
def copy(demo_shards, tmp_path):
    """The small demo's training split, to be changed."""
    for path in (demo_shards / "train").iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    return tmp_path


def _written(folder, table):
    pq.write_table(table, folder / "clips.parquet")


def _refused(folder, message, step=open_folders):
    with pytest.raises(AvtrainError, match=message) as caught:
        step([str(folder)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_columns_are_those_of_the_format():
    assert schema().equals(SCHEMA)


def test_rows_say_what_stands_in_the_tars(demo_shards, tree):
    locations = [tree / "charades/train", tree / "charades/test", tree / "kinetics-sounds/test", demo_shards / "train"]
    for location in locations:
        folder, number = open_folders([str(location)]), 0
        assert pq.read_table(location / "clips.parquet").equals(table_of(location))
        for shard, path in enumerate(sorted(location.glob("*.tar"))):
            with tarfile.open(path) as tar:
                members = {member.name: tar.extractfile(member).read() for member in tar}
            for position, key in enumerate(dict.fromkeys(name.partition(".")[0] for name in members)):
                info, row = json.loads(members[f"{key}.json"]), folder.rows[number]
                assert row == folder.rows.at(row.place) and row.place == (shard, position) and row.key == key
                assert [row.labels, row.frames, row.mel_frames, row.start_s, row.end_s] == [
                    info[name] for name in ("labels", "frames", "mel_frames", "start_s", "end_s")]
                assert ShardReader(folder).read(shard, position) == (key, {
                    ending: members[f"{key}.{ending}"] for ending in ("mp4", "logmel.npy")
                    if f"{key}.{ending}" in members})
                number += 1
        assert number == len(folder.rows) == folder.clips
        assert folder.rows.labels() == [row.labels for row in folder.rows]
        assert folder.rows.keys() == [row.key for row in folder.rows]


def test_rows_of_several_folders_and_some_of_them(tree):
    parts = [open_folders([str(tree / "charades" / split)]).rows for split in ("train", "test")]
    both = open_folders([str(tree / "charades" / split) for split in ("train", "test")])
    assert both.rows.keys() == parts[0].keys() + parts[1].keys()
    assert both.rows.labels() == parts[0].labels() + parts[1].labels()
    assert [row.place.shard for row in both.rows][-1] == len(both.shards) - 1
    some = both.rows.taken([4, 1, 6])
    assert [some.labels(), some.keys()] == [[both.rows[number].labels for number in (4, 1, 6)],
                                            [both.rows[number].key for number in (4, 1, 6)]]
    assert some[1:].keys() == some.keys()[1:] and some[-1].key == both.rows[6].key
    assert both.rows.have_label().tolist() == [bool(row.labels) for row in both.rows]
    assert some.have_label().tolist() == [bool(row.labels) for row in some]
    # Worker processes that are not forked get them so.
    again = pickle.loads(pickle.dumps(both))
    assert list(again.rows) == list(both.rows) and ShardReader(again).read(0, 1) == ShardReader(both).read(0, 1)


def test_no_tar_is_opened_to_learn_what_a_row_says(copy):
    before = open_folders([str(copy)]).rows.labels()
    for path in copy.glob("*.tar"):
        path.unlink()
    assert usable_clips(open_folders([str(copy)]), "both", "training").labels() == before
    with pytest.raises(AvtrainError, match="train-000000.tar can't be read"):
        ShardReader(open_folders([str(copy)])).read(0, 0)


def test_many_clips_cost_little_time_and_memory_and_no_object_each(tmp_path):
    """A tenth of what `make bench` measures: under a tenth of the time and memory, and what any number costs."""
    total = make_folder(tmp_path, 41_000)
    clips, found, seconds, mib = listed(tmp_path)
    assert (clips, found) == (41_000, total)
    assert seconds < 0.1 + 0.4 and mib < 30 + 20
    gc.collect()
    before = len(gc.get_objects())
    folder = open_folders([str(tmp_path)])
    usable_clips(folder, "visual", "training")
    gc.collect()
    assert len(gc.get_objects()) - before < 2000 and folder.clips == 41_000


def _with(name, row, value):
    """A table in which one field is another."""
    def change(table):
        values = table[name].to_pylist()
        values[row] = value(values[row]) if callable(value) else value
        at = table.schema.get_field_index(name)
        return table.set_column(at, name, pa.array(values, table.schema.field(name).type))

    return change


@pytest.mark.parametrize(("change", "message"), [
    (_with("shard", 2, "other.tar"), "row 3 .*its shard is not in the index"),
    (_with("shard", 2, "train-000000.tar"), "row 3 .*its shard is not the one"),
    (lambda table: table.take(list(range(9, -1, -1))), "row 1 .*its shard is not the one"),
    (_with("key", 1, "../x"), "row 2 .*the key is none"), (_with("key", 1, ""), "row 2 .*the key is none"),
    (lambda table: _with("key", 5, table["key"][2].as_py())(table), "row 6 .*the key stands in a row before"),
    (_with("start_s", 0, float("nan")), "row 1 .*start and end"), (_with("end_s", 0, -1.0), "row 1 .*start and end"),
    (_with("labels", 3, [0, 8]), "row 4 .*none of the 8 classes"), (_with("labels", 9, [-1]), "row 10 .*none of the 8"),
    (_with("frames", 1, -3), "frames without a member mp4"), (_with("mel_frames", 1, -3), "without a member logmel"),
    (lambda table: _with("mp4_size", 1, None)(_with("mp4_offset", 1, None)(table)), "frames without a member mp4"),
    (_with("mp4_size", 1, None), "row 2 .*outside its shard"), (_with("mp4_offset", 1, None), "without a member mp4"),
    (_with("logmel_offset", 1, 0), "row 2 .*outside its shard"), (_with("logmel_offset", 1, 777), "outside its shard"),
    (_with("logmel_offset", 1, 1 << 40), "outside its shard"), (_with("logmel_size", 1, 1 << 62), "outside its shard"),
    (_with("json_size", 1, 10**7), "outside its shard"), (_with("json_offset", 1, -512), "without a member json"),
    (_with("key", 1, None), "empty fields in key"), (_with("labels", 1, [None]), "empty fields in labels"),
    (_with("json_size", 1, None), "empty fields in json_size"),
    (lambda table: table.slice(1), "9 rows, where the index has 10 clips"),
    (lambda table: table.drop_columns(["marks"]), "no column marks as it must be"),
    (lambda table: table.set_column(7, "frames", pc.cast(table["frames"], pa.int64())), "no column frames as it must"),
])
def test_a_row_that_can_not_be_is_refused(copy, change, message):
    _written(copy, change(table_of(copy)))
    assert str(copy / "clips.parquet") in _refused(copy, message)


def test_rows_of_one_shard_stand_in_the_order_of_the_tar(demo_shards, tmp_path):
    """The small demo's shards hold a clip each: two clips in one."""
    index = json.loads((demo_shards / "train/index.json").read_text())
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        for entry in index["shardlist"][:2]:
            with tarfile.open(demo_shards / "train" / entry["url"]) as tar:
                for member in tar:
                    out.addfile(member, tar.extractfile(member))
    entry = {"url": "a.tar", "nsamples": 2, "filesize": (tmp_path / "a.tar").stat().st_size, "sha256": "0" * 64}
    (tmp_path / "index.json").write_text(json.dumps({**index, "format_version": 2, "shardlist": [entry]}))
    table = table_of(tmp_path)
    _written(tmp_path, table)
    assert open_folders([str(tmp_path)]).clips == 2
    _written(tmp_path, table.take([1, 0]))
    _refused(tmp_path, "row 2 .*not behind those of the row before")


def test_a_manifest_that_is_not_there_or_is_none(copy, tmp_path):
    (copy / "clips.parquet").write_bytes((copy / "clips.parquet").read_bytes()[:-50])
    _refused(copy, "clips.parquet is not the manifest that goes with its index")
    (copy / "clips.parquet").write_text("key,source")
    _refused(copy, "clips.parquet is not the manifest that goes with its index")
    (copy / "clips.parquet").unlink()
    _refused(copy, "no .*clips.parquet, which says where the clips of .* lie: build the split again")


def test_version_1_is_refused_with_the_command_that_builds_it_again(demo_shards, tmp_path):
    folder = tmp_path / "shards/demo/train"
    shutil.copytree(demo_shards / "train", folder)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "format_version": 1}))
    said = _refused(folder, "has format version 1, this avtrain reads 2: build the split again")
    assert f"`avprep build --dataset demo --split train --out {tmp_path / 'shards'}`" in said
    done = invoke("pretrain", "--shards", folder, "--out", tmp_path / "run", "--device", "cpu")
    assert done.exit_code == 1 and "format version 1" in done.output and "Traceback" not in done.output


def _rewrite(folder, change):
    """Every shard's bytes as `change` gives them."""
    for path in folder.glob("*.tar"):
        path.write_bytes(change(path.read_bytes()))


def _changed_video_header(content, change):
    """The header of the first clip's video as `change` leaves it, with the right checksum."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        at = next(member.offset for member in tar if member.name.endswith(".mp4"))
    header = tarfile.TarInfo.frombuf(content[at:at + 512], "utf-8", "strict")
    change(header)
    return content[:at] + header.tobuf(tarfile.USTAR_FORMAT) + content[at + 512:]


def _other_name(content):
    return _changed_video_header(content, lambda header: setattr(header, "name", header.name.replace("-0000", "-0001")))


def _smaller(content):
    return _changed_video_header(content, lambda header: setattr(header, "size", header.size - 1))


@pytest.mark.parametrize(("change", "message"), [
    (lambda content: content[:-512], "has .* bytes, its index says"),
    (lambda content: content + bytes(512), "has .* bytes, its index says"),
    (_other_name, "does not lie at byte [0-9]+ with"), (_smaller, "does not lie at byte [0-9]+ with"),
    (lambda content: content[512:] + bytes(512), "does not lie at byte"),
    (lambda content: bytes(len(content)), "does not lie at byte"),
])
def test_a_tar_that_does_not_fit_its_row_is_named_and_refused(copy, change, message):
    folder = open_folders([str(copy)])
    assert ShardReader(folder).read(3, 0)[0]
    _rewrite(copy, change)

    def read(_):
        ShardReader(folder).read(3, 0)

    assert "train-000003.tar" in _refused(copy, message, read)


def test_a_log_mel_that_is_shorter_than_its_row_says_is_unreadable(copy):
    _written(copy, _with("mel_frames", 0, lambda frames: frames + 1)(table_of(copy)))
    [one] = ClipDataset(open_folders([str(copy)]), DataConfig(segment_frames=8), None)[ClipPlace(0, 0), 0].unreadable
    assert "its log-mel has 80 x 1920 values, its row says 1921 frames" in one.reason
