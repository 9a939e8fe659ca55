"""Every adapter on the layouts people have on disk, through `avprep build`."""

import json
import shutil

import pyarrow.parquet as pq
import pytest

from avprep.datasets import DATASETS
from avprep.shards import read_samples


@pytest.fixture(scope="module")
def video(ffmpeg, tmp_path_factory):
    """45 s of moving pictures with sound, small and quick."""
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48:r=5:d=45", "-f", "lavfi", "-i", "sine=300:r=16000:d=45",
           "-c:v", "libx264", "-preset", "ultrafast", "-shortest", path)
    return path


@pytest.fixture
def short(short_video):
    """3 s of the same."""
    return short_video


def _put(source, *places):
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, place)


def _build(avprep, tmp_path, dataset, split):
    done = avprep("build", "--dataset", dataset, "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--split", split)
    assert done.returncode == 0, done.stderr
    return done


def _read(tmp_path, dataset, split):
    folder = tmp_path / "out" / dataset / split
    index = json.loads((folder / "index.json").read_text())
    infos = {sample.key: json.loads(sample.members["json"]) for entry in index["shardlist"]
             for sample in read_samples(folder / entry["url"])}
    skipped = [{"path": row["name"], **row} for row in pq.read_table(folder / "sources.parquet").to_pylist()
               if row["status"] == "skipped"]
    return index, infos, skipped


@pytest.mark.parametrize("csv_name", ["train.csv", "annotations/train.csv", "kinetics700_train.csv"])
def test_kinetics(avprep, video, short, tmp_path, csv_name):
    raw = tmp_path / "raw"
    _put(short, raw / "flat-_1abcde_000003_000013.mp4", raw / "train/juggling balls/AAAAAAAAAAA_000000_000010.mkv")
    _put(video, raw / "whole/BBBBBBBBBBB.webm")
    table = raw / csv_name
    table.parent.mkdir(exist_ok=True)
    table.write_text("label,youtube_id,time_start,time_end,split\n"
                     "zumba,flat-_1abcde,3,13,train\n"
                     "juggling balls,AAAAAAAAAAA,0,10,train\n"
                     "zumba,BBBBBBBBBBB,30,40,train\n"
                     "juggling balls,BBBBBBBBBBB,2,12,train\n"
                     "zumba,CCCCCCCCCCC,1,11,train\n"
                     "zumba,AAAAAAAAAAA,0,10,train\n")
    _build(avprep, tmp_path, "kinetics700", "train")
    index, infos, skipped = _read(tmp_path, "kinetics700", "train")
    assert index["classes"] == ["juggling balls", "zumba"]
    assert infos["AAAAAAAAAAA_000000_000010-0000"]["labels"] == [0]
    assert infos["flat-_1abcde_000003_000013-0000"]["labels"] == [1]
    assert infos["flat-_1abcde_000003_000013-0000"]["frames"] == 48  # trimmed already: from its start
    # 30 s around the middle of the moment, within the 45 s there are.
    late, early = infos["BBBBBBBBBBB_000030_000040-0000"], infos["BBBBBBBBBBB_000002_000012-0000"]
    assert (late["start_s"], late["frames"]) == (15.0, 480) and (early["start_s"], early["frames"]) == (0.0, 480)
    assert {(line["path"], line["reason"]) for line in skipped} == {
        ("CCCCCCCCCCC_000001_000011", "listed, but no such file"), ("AAAAAAAAAAA_000000_000010", "listed twice")}
    assert index["counts"]["sources_found"] == 6


def test_kinetics_video_that_ends_before_its_moment_is_no_trimmed_one(avprep, video, short, tmp_path):
    """45 s of a video whose moment is at 60 s: nothing of it has the label. A file of 3 s is the moment itself."""
    raw = tmp_path / "raw"
    _put(video, raw / "AAAAAAAAAAA.mp4")
    _put(short, raw / "BBBBBBBBBBB.mp4")
    (raw / "train.csv").write_text("Label,youtube_id,time_start,time_end\na,AAAAAAAAAAA,60,70\nb,BBBBBBBBBBB,60,70\n")
    _build(avprep, tmp_path, "kinetics400", "train")
    folder = tmp_path / "out/kinetics400/train"
    [failure] = [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]
    assert failure["reason"] == "truncated" and "ends at 45.0 s, before its moment, 60 to 70 s" in failure["detail"]
    [info] = _read(tmp_path, "kinetics400", "train")[1].values()
    assert info["labels"] == [1] and info["start_s"] == 0


def test_kinetics_all_builds_the_splits_that_are_there(avprep, short, tmp_path):
    raw = tmp_path / "raw"
    for split in ("train", "validate"):
        _put(short, raw / f"{split}AAAAAAA_000000_000010.mp4")
        (raw / f"{split}.csv").write_text(f"label,youtube_id,time_start,time_end\na,{split}AAAAAAA,0,10\n")
    done = _build(avprep, tmp_path, "kinetics600", "all")
    assert "kinetics600 train:" in done.stdout and "kinetics600 val:" in done.stdout
    assert "test:" not in done.stdout


def test_audioset(avprep, video, short, tmp_path):
    raw = tmp_path / "raw"
    _put(short, raw / "audio/Y-AAAAAAAAAA.mp4", raw / "BBBBBBBBBBB_30000_40000.mp4")
    _put(video, raw / "CCCCCCCCCCC.mp4")
    (raw / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n2,/m/0dgw9r,"Sounds"\n')
    (raw / "eval_segments.csv").write_text(
        "# Segments csv created Sun Mar  5 10:54:25 2017\n# num_ytids=4\n"
        "# YTID, start_seconds, end_seconds, positive_labels\n"
        '-AAAAAAAAAA, 0.000, 10.000, "/m/09x0r,/m/05zppz"\n'
        'BBBBBBBBBBB, 30.000, 40.000, "/m/0dgw9r"\n'
        'CCCCCCCCCCC, 30.000, 40.000, "/m/09x0r"\n'
        'DDDDDDDDDDD, 0.000, 10.000, "/m/09x0r"\n')
    _build(avprep, tmp_path, "audioset", "eval")
    index, infos, skipped = _read(tmp_path, "audioset", "eval")
    assert index["multi_label"] and index["classes"][1] == "Male speech, man speaking"
    by_source = {info["source"]: info for info in infos.values()}
    assert by_source["audio/Y-AAAAAAAAAA.mp4"]["labels"] == [0, 1]
    assert by_source["BBBBBBBBBBB_30000_40000.mp4"]["start_s"] == 0  # shorter than its moment's start: trimmed
    assert by_source["CCCCCCCCCCC.mp4"]["start_s"] == 15
    assert [line["path"] for line in skipped] == ["DDDDDDDDDDD_000000_000010"]
    assert index["counts"]["clips_per_class"] == [2, 1, 1]


def test_ucf101(avprep, media, short, tmp_path):
    raw = tmp_path / "raw"
    _put(media / "mmaction_test.avi", raw / "UCF-101/Archery/v_Archery_g01_c01.avi")
    _put(short, raw / "UCF-101/Biking/v_Biking_g08_c01.avi")
    lists = raw / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\n2 Biking\n")
    for number in "123":
        (lists / f"trainlist0{number}.txt").write_text("Biking/v_Biking_g08_c01.avi 2\nBiking/v_Biking_g09_c01.avi 2\n")
        (lists / f"testlist0{number}.txt").write_text("Archery/v_Archery_g01_c01.avi\n")
    _build(avprep, tmp_path, "ucf101", "all")
    for split in ("train1", "train2", "train3"):
        index, infos, skipped = _read(tmp_path, "ucf101", split)
        assert [info["labels"] for info in infos.values()] == [[1]] and len(skipped) == 1
    _, infos, _ = _read(tmp_path, "ucf101", "test3")
    assert infos["v_Archery_g01_c01-0000"]["labels"] == [0]
    wrong = avprep("build", "--dataset", "ucf101", "--raw", raw, "--out", tmp_path, "--split", "train")
    assert wrong.returncode == 1 and "train1, test1, train2" in wrong.stderr


def test_esc10_builds_into_five_folds_without_pictures(avprep, esc10, tmp_path):
    done = avprep("build", "--dataset", "esc10", "--raw", esc10, "--out", tmp_path / "out", "--split", "all")
    assert done.returncode == 0, done.stderr
    total, found = 0, len(list(esc10.rglob("*.ogg")))
    assert found in (400, 50)  # the real ones; those made in their place
    for fold in range(1, 6):
        index, infos, _ = _read(tmp_path, "esc10", f"fold{fold}")
        assert index["counts"]["clips"] == index["counts"]["without_picture"] == found // 5
        assert index["classes"][0] == "Dog bark" and index["counts"]["clips_per_class"] == [found // 50] * 10
        assert all(info["source"].split("/")[1].startswith(f"{fold}-") for info in infos.values())
        total += len(infos)
    assert total == found


def test_esc50_and_its_esc10_rows(avprep, ffmpeg, tmp_path):
    raw = tmp_path / "raw"
    (raw / "audio").mkdir(parents=True)
    (raw / "meta").mkdir()
    rows = [("1-1-A-0.wav", 1, 0, "dog", True), ("1-2-A-7.wav", 1, 7, "rooster", False),
            ("2-3-A-9.wav", 2, 9, "cow", True)]
    for name, *_ in rows:
        ffmpeg("-f", "lavfi", "-i", "anoisesrc=d=5:c=pink:r=44100:a=0.3", raw / "audio" / name)
    (raw / "meta/esc50.csv").write_text("filename,fold,target,category,esc10,src_file,take\n" + "".join(
        f"{name},{fold},{target},{category},{esc10},1,A\n" for name, fold, target, category, esc10 in rows))
    _build(avprep, tmp_path, "esc50", "fold1")
    index, infos, _ = _read(tmp_path, "esc50", "fold1")
    assert index["classes"] == ["dog", "rooster", "cow"]
    assert {info["labels"][0] for info in infos.values()} == {0, 1}
    _build(avprep, tmp_path, "esc10", "fold2")
    index, infos, _ = _read(tmp_path, "esc10", "fold2")
    assert index["classes"] == ["dog", "cow"] and [info["labels"] for info in infos.values()] == [[1]]


def test_charades_labels_belong_to_the_clips_they_overlap(avprep, video, tmp_path):
    raw = tmp_path / "raw"
    _put(video, raw / "Charades_v1_480/ABCDE.mp4")
    (raw / "Charades").mkdir()
    (raw / "Charades/Charades_v1_classes.txt").write_text("c000 Holding some clothes\nc001 Putting clothes somewhere\n")
    (raw / "Charades/Charades_v1_train.csv").write_text(
        'id,subject,scene,actions,length\nABCDE,X,"Kitchen, small",c000 2.00 8.50;c001 28.00 40.00,45.0\n'
        "FGHIJ,X,Hall,,30.0\n")
    _build(avprep, tmp_path, "charades", "train")
    index, infos, skipped = _read(tmp_path, "charades", "train")
    first, second = infos["ABCDE-0000"], infos["ABCDE-0001"]
    assert (first["labels"], first["label_times_s"]) == ([0, 1], [[2.0, 8.5], [28.0, 40.0]])
    assert (second["labels"], second["label_times_s"]) == ([1], [[-2.0, 10.0]])
    assert index["multi_label"] and index["classes"][0] == "Holding some clothes"
    assert [line["path"] for line in skipped] == ["FGHIJ"]


def test_kinetics_sounds_class_without_test_clips_keeps_its_number(avprep, short, tmp_path):
    raw = tmp_path / "raw"
    _put(short, raw / "train/b singing/x.mp4", raw / "train/a tapping/y.mp4", raw / "test/b singing/z.mp4")
    _build(avprep, tmp_path, "kinetics-sounds", "all")
    for split in ("train", "test"):
        assert _read(tmp_path, "kinetics-sounds", split)[0]["classes"] == ["a tapping", "b singing"]
    [info] = _read(tmp_path, "kinetics-sounds", "test")[1].values()
    assert info["labels"] == [1]


def test_odd_file_names_give_safe_unique_keys(avprep, short, tmp_path):
    raw = tmp_path / "raw"
    names = ["a.b.c.mp4", "a_b.c.mp4", "-rf.mp4", "Ünïcødé 猫.mp4", "x" * 180 + ".mp4", "x" * 181 + ".mp4",
             "sub/a.b.c.mp4", "sub dir/quote'\"$(touch pwned).mp4", "concat:x.mp4", "%03d.mp4"]
    _put(short, *(raw / name for name in names))
    _build(avprep, tmp_path, "folder", "train")
    index, infos, _ = _read(tmp_path, "folder", "train")
    assert {info["source"] for info in infos.values()} == set(names) and len(infos) == len(names)
    for key in infos:
        assert key.isascii() and "." not in key and "/" not in key and not key.startswith("-") and len(key) < 95
    assert not list(tmp_path.rglob("*pwned"))


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "demo"])
def test_every_dataset_says_what_to_do_when_its_files_are_absent(avprep, tmp_path, name):
    (tmp_path / "empty").mkdir()
    absent = avprep("build", "--dataset", name, "--raw", tmp_path / "nowhere")
    assert absent.returncode == 1 and "nowhere" in absent.stderr and "--dataset demo" in absent.stderr
    assert DATASETS[name].layout in absent.stderr and DATASETS[name].origin in absent.stderr
    empty = avprep("build", "--dataset", name, "--raw", tmp_path / "empty", "--split", "all")
    assert empty.returncode == 1 and "Traceback" not in empty.stderr and str(tmp_path / "empty") in empty.stderr
