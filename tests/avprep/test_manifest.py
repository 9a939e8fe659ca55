"""The tables beside the index say what stands in the tars and what became of every source; no tar is listed for it."""

import json
import shutil
import subprocess
import sys
import tarfile

import pyarrow.parquet as pq
import pytest

import avprep.build as building
from avprep import making, manifest
from avprep.spec import ClipSpec

COLUMNS = {"key": "string", "source": "string", "shard": "string", "start_s": "double", "end_s": "double",
           "labels": "list<element: int32>", "label_times_s": "list<element: list<element: double>>",
           "frames": "int32", "width": "int32", "height": "int32", "sound_s": "double", "mel_frames": "int32",
           "missing": "list<element: string>", "marks": "list<element: string>",
           **{f"{member}_{what}": "int64" for member in ("mp4", "logmel", "json") for what in ("offset", "size")}}


def _rows(folder, name="clips"):
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def _build(raw, out, dataset="folder", shard_bytes=10**6):
    options = building.BuildOptions(dataset, raw, out, ClipSpec(), 2, shard_bytes, 60)
    return building.build_split(options, "train")


@pytest.fixture(scope="module")
def charades(tmp_path_factory, short_video, short_sound, silent_video):
    """Labels with times, a file without pictures, one without sound, a broken one, and a row without a file."""
    raw = tmp_path_factory.mktemp("charades") / "raw"
    raw.mkdir()
    (raw / "Charades_v1_classes.txt").write_text("c0 a\nc1 b\n")
    (raw / "Charades_v1_train.csv").write_text(
        "id,actions\nAAAAA,c1 0.5 1;c0 0 9;c1 2 3\nBBBBB,c0 0 1\nCCCCC,\nDDDDD,c0 0 1\nEEEEE,c0 0 1\n")
    for name, source in (("AAAAA.mp4", short_video), ("BBBBB.wav", short_sound), ("CCCCC.mp4", silent_video)):
        shutil.copy(source, raw / name)
    (raw / "AAAAA.mkv").write_text("broken")
    (raw / "DDDDD.mp4").write_text("broken")
    report = _build(raw, raw.parent, "charades", 1000)
    assert report.shards == 3
    return report.folder


def test_the_rows_of_clips_are_their_json_and_their_places(charades):
    table = pq.read_table(charades / "clips.parquet")
    assert {field.name: str(field.type) for field in table.schema} == COLUMNS
    index = json.loads((charades / "index.json").read_text())
    rows = table.to_pylist()
    assert [row["shard"] for row in rows] == [entry["url"] for entry in index["shardlist"]]
    for row in rows:
        shard = (charades / row["shard"]).read_bytes()
        with tarfile.open(charades / row["shard"]) as tar:
            assert tar.getnames() == sorted(tar.getnames())
            for member, ending in (("mp4", "mp4"), ("logmel", "logmel.npy"), ("json", "json")):
                offset, size = row[f"{member}_offset"], row[f"{member}_size"]
                if f"{row['key']}.{ending}" in tar.getnames():
                    assert shard[offset:offset + size] == tar.extractfile(f"{row['key']}.{ending}").read()
                else:
                    assert offset is size is None
        info = json.loads(shard[row["json_offset"]:row["json_offset"] + row["json_size"]])
        shared = [name for name in COLUMNS if name != "shard" and not name.endswith(("_offset", "_size"))]
        assert {name: row[name] for name in shared} == {name: info.get(name) for name in shared}
    by_key = {row["key"]: row for row in rows}
    assert by_key["AAAAA-0000"]["labels"] == [1, 0]
    assert by_key["AAAAA-0000"]["label_times_s"] == [[0.5, 1, 2, 3], [0, 9]]
    assert by_key["BBBBB-0000"]["mp4_offset"] is None and by_key["BBBBB-0000"]["missing"] == ["picture"]
    assert by_key["CCCCC-0000"]["logmel_size"] is None and by_key["CCCCC-0000"]["label_times_s"] == []


def test_every_source_has_a_row(charades):
    columns = ("name", "key", "status", "reason", "clips")
    assert [tuple(row[column] for column in columns) for row in _rows(charades, "sources")] == [
        ("AAAAA.mkv", None, "skipped", "another file of its id was taken", 0),
        ("AAAAA.mp4", "AAAAA", "written", None, 1), ("BBBBB.wav", "BBBBB", "written", None, 1),
        ("CCCCC.mp4", "CCCCC", "written", None, 1), ("DDDDD.mp4", "DDDDD", "failed", "not a readable media file", 0),
        ("EEEEE", None, "skipped", "listed, but no such file", 0)]
    assert not (charades / "skipped.jsonl").exists() and not (charades / "remarks.jsonl").exists()


def test_the_index_names_its_tables_and_others_are_refused(charades, tmp_path, avprep):
    copy = tmp_path / "copy"
    shutil.copytree(charades, copy)
    index = json.loads((copy / "index.json").read_text())
    assert [(entry["url"], entry["nrows"]) for entry in index["manifest"]] == [
        ("clips.parquet", 3), ("sources.parquet", 6)]
    assert manifest.read_clips(copy, index, ["labels"]).column_names == ["labels"]
    table = pq.read_table(copy / "clips.parquet")
    pq.write_table(table.slice(1), copy / "clips.parquet")
    for command in ("verify", "preview"):
        done = avprep(command, copy, cwd=tmp_path)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "clips.parquet is not the one that the index describes" in done.stdout + done.stderr
    (copy / "clips.parquet").unlink()
    done = avprep("verify", copy)
    assert done.returncode == 1 and "clips.parquet can't be read" in done.stdout


@pytest.mark.parametrize("column", ["labels", "frames", "mp4_offset", "json_size", "key"])
def test_verify_names_a_tar_that_does_not_fit_its_row(charades, tmp_path, column):
    from avprep.inspect.verify import problems_of

    copy = tmp_path / "copy"
    shutil.copytree(charades, copy)
    rows = _rows(copy)
    rows[0][column] = {"labels": [0, 0], "key": "other-0000"}.get(column, 7)
    content = manifest.parquet_of(manifest.table_of(rows, manifest.CLIPS_SCHEMA))
    (copy / "clips.parquet").write_bytes(content)
    index = json.loads((copy / "index.json").read_text())
    index["manifest"][0] = manifest.entry_of("clips.parquet", content, len(rows))
    (copy / "index.json").write_text(json.dumps(index))
    [problem] = problems_of(copy / "index.json")
    assert rows[0]["shard"] in problem and problem.endswith(f"its row in clips.parquet says otherwise: {column}")


def test_shards_of_version_1_are_refused_with_the_command_that_rebuilds_them(charades, tmp_path, avprep):
    folder = tmp_path / "out put" / "folder" / "train"
    folder.mkdir(parents=True)
    index = json.loads((charades / "index.json").read_text()) | {"format_version": 1, "dataset": "folder"}
    index["spec"]["fps"] = 15
    (folder / "index.json").write_text(json.dumps(index))
    for command in ("info", "verify", "preview"):
        done = avprep(command, tmp_path / "out put", cwd=tmp_path)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        command = f"avprep build --dataset folder --split train --raw RAW --out '{tmp_path}/out put' --fps 15"
        assert command in done.stderr


def test_what_version_1_left_is_made_anew(charades, tmp_path):
    """Its markers, tars and reports, of the very same sources."""
    raw, out = charades.parents[1] / "raw", tmp_path
    folder = out / "charades" / "train"
    (folder / ".build").mkdir(parents=True)
    for number in range(4):
        (folder / f"train-00000{number}.tar").write_bytes(b"old")
        (folder / f".build/train-00000{number}.json").write_text(json.dumps(
            {"fingerprint": "old", "shard": {"url": f"train-00000{number}.tar", "filesize": 3}, "clips": []}))
    for name in ("index.json", "skipped.jsonl", "remarks.jsonl", ".build/probes.jsonl"):
        (folder / name).write_text("{}")
    _build(raw, out, "charades", 1000)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    expected = {path.relative_to(charades).as_posix(): path.read_bytes() for path in charades.rglob("*")
                if path.is_file()}
    for build in (files, expected):
        del build[".build/finished.json"]  # it says how long the build took
    assert files == expected


def test_tables_fit_the_index_however_a_rerun_ends(charades, tmp_path, monkeypatch):
    """A rerun that finds another file to skip is stopped before its index: then there is none, not an old one."""
    import avprep.account as accounting

    raw = tmp_path / "raw"
    shutil.copytree(charades.parents[1] / "raw", raw)
    report = _build(raw, tmp_path, "charades", 1000)
    index = (report.folder / "index.json").read_bytes()
    written = []
    write_whole = accounting.write_whole

    def noting(path, content):
        written.append(path.name)
        if path.name == "index.json":
            raise KeyboardInterrupt
        write_whole(path, content)

    monkeypatch.setattr(accounting, "write_whole", noting)
    _build(raw, tmp_path, "charades", 1000)
    assert written == [] and (report.folder / "index.json").read_bytes() == index  # nothing new: nothing is touched
    with (raw / "Charades_v1_train.csv").open("a") as file:
        file.write("FFFFF,c0 0 1\n")
    with pytest.raises(KeyboardInterrupt):
        _build(raw, tmp_path, "charades", 1000)
    assert written == ["sources.parquet", "index.json"] and not (report.folder / "index.json").exists()


# --- planning

PLAN = """
import sys
from pathlib import Path
from avprep.datasets import list_split
from avprep.media import ffmpeg_version
from avprep.plan import shard_tasks
from avprep.spec import ClipSpec

ffmpeg_version()
opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
raw = Path(sys.argv[1])
tasks = shard_tasks(list_split("folder", raw, "train").sources, ClipSpec(), "folder", "train", 10**5)
print(len(tasks), [name for name in opened if name.startswith(str(raw))])
"""


def test_planning_opens_no_media_file(put, tmp_path):
    put(b"x" * 40_000, *(f"{number}.mp4" for number in range(30)))
    printed = subprocess.run([sys.executable, "-c", PLAN, tmp_path / "raw"], check=True, capture_output=True, text=True)
    shards, _, opened = printed.stdout.strip().partition(" ")
    assert opened == "[]" and 5 <= int(shards) <= 15


def test_all_clips_of_a_source_stand_together(ffmpeg, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in "abc":
        ffmpeg("-f", "lavfi", "-i", "sine=300:r=8000:d=95", raw / f"{name}.wav")
    report = _build(raw, tmp_path, shard_bytes=1000)
    rows = _rows(report.folder)
    assert report.shards == 3 and report.clips == 12
    for first in range(0, 12, 4):
        [shard], [name] = ({row[column] for row in rows[first:first + 4]} for column in ("shard", "source"))
        assert [row["start_s"] for row in rows[first:first + 4]] == [0, 30, 60, 90]


def test_a_file_of_the_same_size_with_other_content_is_built_anew(tmp_path, ffmpeg):
    raw = tmp_path / "raw"
    raw.mkdir()
    ffmpeg("-f", "lavfi", "-i", "sine=300:r=8000:d=3", raw / "a.wav")
    report = _build(raw, tmp_path)
    first = (report.folder / "train-000000.tar").read_bytes()
    size = (raw / "a.wav").stat().st_size
    ffmpeg("-f", "lavfi", "-i", "sine=900:r=8000:d=3", raw / "a.wav")
    assert (raw / "a.wav").stat().st_size == size
    assert _build(raw, tmp_path).new_clips_s == 3 and (report.folder / "train-000000.tar").read_bytes() != first
    assert _build(raw, tmp_path).new_clips_s == 0


def test_a_shard_hands_out_all_its_clips_before_the_next(put, tmp_path, short_sound, monkeypatch):
    """So that a build that is killed has few shards half done."""
    put(short_sound, *(f"{number}.wav" for number in range(36)))
    order, windows = [], making.windows

    def noting(source, *more):
        order.append(source.name)
        return windows(source, *more)

    monkeypatch.setattr(making, "windows", noting)
    report = _build(tmp_path / "raw", tmp_path, shard_bytes=6 * 10**5)
    shard_of = {row["source"]: row["shard"] for row in _rows(report.folder)}
    shards = [shard_of[name] for name in order]
    changes = sum(one != other for one, other in zip(shards, shards[1:], strict=False))
    assert 2 <= report.shards <= 4 and changes == report.shards - 1
