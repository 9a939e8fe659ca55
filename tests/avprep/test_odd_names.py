"""No single file, name or row ends a build: each is a line of the account, and what is good beside it is built."""

import json
import os

import pytest

from avprep.datasets import list_split

KINETICS = "label,youtube_id,time_start,time_end,split\n"
LATIN1 = os.fsdecode(b"caf\xe9")


def test_files_that_are_none_and_links(put, build, tmp_path, short_video):
    raw = tmp_path / "raw"
    put(short_video, "cat/good.mp4", "cat/folder.mp4/inside.mp4", "../store/dog/a.mp4", "../store/b.mp4")
    (raw / "dog").symlink_to("../store/dog")
    (raw / "cat/linked.mp4").symlink_to("../../store/b.mp4")
    (raw / "cat/dangling.mp4").symlink_to("nothing.mp4")
    (raw / "cat/circle.mp4").symlink_to("circle.mp4")
    (raw / "cat/empty.mp4").mkdir()
    os.mkfifo(raw / "cat/pipe.mp4")
    (raw / "cat/up").symlink_to("..")
    (raw / "dog/up").symlink_to(raw)
    (raw / "all").symlink_to("/")
    (raw / "gone").symlink_to("nowhere")
    built = build("folder")
    assert {source: info["labels"] for source, info in built.by_source.items()} == {
        "cat/good.mp4": [0], "cat/folder.mp4/inside.mp4": [0], "cat/linked.mp4": [0], "dog/a.mp4": [1]}
    assert built.classes == ["cat", "dog"]
    assert {line["path"]: line["reason"] for line in built.failures} == {
        "cat/dangling.mp4": "can't be opened", "cat/circle.mp4": "can't be opened",
        "cat/pipe.mp4": "not a regular file"}
    assert {line["path"]: line["reason"] for line in built.skipped} == {
        "cat/empty.mp4": "an empty folder, named like a media file", "gone": "not named like a media file",
        **dict.fromkeys(("all", "cat/up", "dog/up"), "a link to a folder that it lies in")}
    assert "a link to nothing.mp4" in next(line["detail"] for line in built.failures if "dangling" in line["path"])


def test_links_to_each_other_are_not_walked_in_circles(put, tmp_path):
    put("", "a/1.mp4", "b/2.mp4")
    (tmp_path / "raw/a/b").symlink_to("../b")
    (tmp_path / "raw/b/a").symlink_to("../a")
    listing = list_split("folder", tmp_path / "raw", "train")
    assert {source.name for source in listing.sources} == {"a/1.mp4", "a/b/2.mp4", "b/2.mp4", "b/a/1.mp4"}
    assert {entry.name for entry in listing.skipped} == {"a/b/a", "b/a/b"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_and_folders_without_permission(put, build, tmp_path, short_video):
    put(short_video, "a/good.mp4", "a/closed.mp4", "b/closed.mp4")
    (tmp_path / "raw/a/closed.mp4").chmod(0)
    (tmp_path / "raw/b").chmod(0)
    built = build("folder")
    assert set(built.by_source) == {"a/good.mp4"}
    assert [(line["path"], line["reason"]) for line in built.failures] == [("a/closed.mp4", "can't be opened")]
    assert [(line["path"], line["reason"]) for line in built.skipped] == [("b", "a folder that can't be read")]


def test_a_file_that_goes_away_during_the_build(put, tmp_path, monkeypatch, short_video):
    import avprep.build as building
    from avprep import making
    from avprep.spec import ClipSpec

    put(short_video, "a.mp4", "b.mp4")
    windows = making.windows

    def taking_one_away(*arguments):
        (tmp_path / "raw/a.mp4").unlink(missing_ok=True)
        return windows(*arguments)

    monkeypatch.setattr(making, "windows", taking_one_away)
    report = building.build_split(
        building.BuildOptions("folder", tmp_path / "raw", tmp_path, ClipSpec(), 1, 10**6, 60), "train")
    assert (report.written, sum(report.failed.values())) == (1, 1)


@pytest.mark.parametrize("below", [("",), (LATIN1,)])
def test_names_that_are_not_utf8_are_built_and_printed(avprep, tmp_path, short_video, below):
    """In the class, the file's name, what is skipped and, once, the raw and the output folder."""
    raw, out = tmp_path.joinpath("raw", *below), tmp_path.joinpath("out", *below)
    for name in (f"{LATIN1}/x.mp4", f"{LATIN1} 2/{LATIN1}.mp4", "ok/x.mp4", f"ok/{LATIN1}.txt"):
        path = raw / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(short_video.read_bytes())
    (raw / f"ok/{LATIN1}.mkv").write_text("broken")
    (raw / f"ok/{LATIN1}.mov").symlink_to(LATIN1)
    done = avprep("build", "--dataset", "folder", "--raw", raw, "--out", out)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "6 files found = 3 written + 1 (1 not named like a media file) skipped + 2 (" in done.stdout
    folder = out / "folder/train"
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    assert index["classes"] == [r"caf\xe9", r"caf\xe9 2", "ok"] and index["counts"]["clips_per_class"] == [1, 1, 1]
    failures = (folder / "failures.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["path"] for line in failures} == {r"ok/caf\xe9.mkv", r"ok/caf\xe9.mov"}
    assert avprep("info", out).returncode == avprep("verify", out).returncode == 0
    assert "all shards were there already" in avprep("build", "--dataset", "folder", "--raw", raw, "--out", out).stdout


# --- rows

BAD_ROWS = {
    "NaN": "b,BBBBBBBBBBB,NaN,NaN,train", "empty": "b,BBBBBBBBBBB,,,train", "infinite": "b,BBBBBBBBBBB,0,inf,train",
    "too large": "b,BBBBBBBBBBB,0,1e999,train", "backwards": "b,BBBBBBBBBBB,9,4,train",
    "negative": "b,BBBBBBBBBBB,-4,4,train", "words": "b,BBBBBBBBBBB,now,then,train", "cut": "b,BBBBB",
    "one too few": "b,BBBBBBBBBBB,0,4", "one too many": "b,BBBBBBBBBBB,0,4,train,5", "no id": "b,,0,4,train",
    "a quote that is not closed": '"b,BBBBBBBBBBB,0,4,train'}


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in BAD_ROWS.items()])
@pytest.mark.parametrize("last", [False, True])
def test_a_bad_row_of_kinetics_is_a_line_of_the_account(put, tmp_path, row, last):
    good = 'a,AAAAAAAAAAA,0,4,train\n"c, d",CCCCCCCCCCC,0,4,train,\n'
    put(KINETICS + (good + row if last else row + "\n\n" + good), "train.csv")
    put("", "AAAAAAAAAAA.mp4", "BBBBBBBBBBB.mp4", "CCCCCCCCCCC.mp4")
    listing = list_split("kinetics700", tmp_path / "raw", "train")
    assert [source.name[0] for source in listing.sources] == ["A", "C"] and listing.classes == ["a", "c, d"]
    [line] = listing.skipped
    assert line.name == f"train.csv line {4 if last else 2}" and line.detail == row


def test_rows_that_are_not_utf8_or_run_over_lines(put, tmp_path):
    rows = b'caf\xe9,BBBBBBBBBBB,0,4,train,\n a ,AAAAAAAAAAA,0,4,train,"two\nlines"\na,CCCCCCCCCCC,0,4,train,caf\xe9\n'
    put((KINETICS[:-1] + ",note\n").encode() + rows, "train.csv")
    put("", "AAAAAAAAAAA.mp4", "BBBBBBBBBBB.mp4", "CCCCCCCCCCC.mp4")
    listing = list_split("kinetics700", tmp_path / "raw", "train")
    assert [source.name[0] for source in listing.sources] == ["A", "C"] and listing.classes == ["a"]
    assert [line.detail for line in listing.skipped] == [r"caf\xe9,BBBBBBBBBBB,0,4,train,"]


def test_bad_rows_of_the_other_datasets(put, build, short_video, short_sound):
    put(short_video, *(f"{letter * 11}.mp4" for letter in "ABCD"), *(f"Charades_v1/{x * 5}.mp4" for x in "ABCDEF"),
        "UCF-101/A/1.avi", "UCF-101/b/1.avi")
    put(short_sound, *(f"audio/1-{number}.wav" for number in range(4)))
    put('index,mid,display_name\n0,/m/1,"Speech"\n', "class_labels_indices.csv")
    put('\ufeff# x\nAAAAAAAAAAA, 0.0, 4.0, "/m/1"\nBBBBBBBBBBB, nan, 4.0, "/m/1"\nCCCCCCCCCCC, 0.0, 4.0, "/m/1,/m/2"\n'
        "DDDDDDDDDDD, 0.0, 4.0", "eval_segments.csv")
    built = build("audioset", "eval")
    assert set(built.by_source) == {"AAAAAAAAAAA.mp4"}
    assert {line["path"]: line["reason"] for line in built.skipped} == {
        "eval_segments.csv line 3": "a row without usable times", "eval_segments.csv line 5": "not a usable row",
        "eval_segments.csv line 4": "a class that is not in the class list"}

    put("c0 a\n", "Charades_v1_classes.txt")
    put("id,actions,length\nAAAAA,c0 0 1,3\nBBBBB,c0 0 nan,3\nCCCCC,c0 2 1,3\nDDDDD,c9 0 1,3\nEEEEE,c0 0,3\nFFFFF,c0",
        "Charades_v1_train.csv")
    built = build("charades")
    assert set(built.by_source) == {"Charades_v1/AAAAA.mp4"} and len(built.skipped) == 5
    assert built.done.stdout.count("2 a row without usable times") == 1

    put("1 A\n", "ucfTrainTestlist/classInd.txt")
    put(b"A/1.avi 1\nb/1.avi 2\nA\n../../x.avi 1\nA/caf\xe9.avi 1\n", "ucfTrainTestlist/trainlist01.txt")
    built = build("ucf101", "train1")
    assert set(built.by_source) == {"UCF-101/A/1.avi"} and len(built.skipped) == 4

    put("filename,fold,target,category,esc10,src_file\n1-0.wav,1,0,dog,True,1\n1-1.wav,1,x,dog,True,1\n"
        "1-2.wav,9,0,dog,True,1\n1-3", "meta/esc50.csv")
    built = build("esc50", "fold1")
    assert set(built.by_source) == {"audio/1-0.wav"} and len(built.skipped) == 3


@pytest.mark.parametrize(("dataset", "split", "name", "content", "said"), [
    ("kinetics400", "train", "train.csv", "label;youtube_id\n", "no column youtube_id, time_start, time_end (found:"),
    ("kinetics400", "train", "train.csv", KINETICS.encode("utf-16"), "no column"),
    ("kinetics400", "train", "train.csv", "", "no column"),
    ("audioset", "eval", "class_labels_indices.csv", "index,mid,display_name\n0,/m/1,a\nx\n", "line 3"),
    ("ucf101", "train1", "ucfTrainTestlist/classInd.txt", "1 A\n2", "line 2"),
])
def test_a_list_that_is_none_ends_the_build_with_one_line(put, build, short_video, dataset, split, name, content, said):
    put(short_video, "AAAAAAAAAAA.mp4")
    put("", "eval_segments.csv", "ucfTrainTestlist/trainlist01.txt")
    put(content, name)
    [line] = [line for line in build(dataset, split, 1).done.stderr.splitlines() if line]
    assert name in line and said in line
