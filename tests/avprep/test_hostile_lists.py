"""Annotation files of strangers: what is wrong is said with file and line; nothing outside the raw folder is taken."""

import os

import pytest

from avprep.datasets import list_split
from avprep.errors import AvprepError

_ESC50 = "filename,fold,target,category,esc10,src_file\n"
_MIDS = 'index,mid,display_name\n0,/m/1,"Speech"\n'


def _tables(name, start, end):
    """(dataset, split, {file: text}) for each dataset, with one good entry before and behind the odd one; `name` is
    the odd one's."""
    yield "kinetics700", "train", {
        "train.csv": "label,youtube_id,time_start,time_end,split\na,AAAAAAAAAAA,0,4,train\n"
                     f"a,{name},{start},{end},train\na,CCCCCCCCCCC,0,4,train\n"}
    yield "audioset", "eval", {
        "class_labels_indices.csv": _MIDS, "eval_segments.csv":
        f'# x\nAAAAAAAAAAA, 0.0, 4.0, "/m/1"\n{name}, {start}, {end}, "/m/1"\nCCCCCCCCCCC, 0.0, 4.0, "/m/1"\n'}
    yield "charades", "train", {
        "Charades_v1_classes.txt": "c0 a\n",
        "Charades_v1_train.csv": f"id,actions\nAAAAAAAAAAA,c0 0 4\n{name},c0 {start} {end}\nCCCCCCCCCCC,c0 0 4\n"}
    yield "ucf101", "train1", {
        "ucfTrainTestlist/classInd.txt": "1 a\n",
        "ucfTrainTestlist/trainlist01.txt": f"a/AAAAAAAAAAA.avi 1\na/{name}.avi 1\na/CCCCCCCCCCC.avi 1\n"}
    yield "esc50", "fold1", {
        "meta/esc50.csv": _ESC50 + f"AAAAAAAAAAA.wav,1,0,dog,True,1\n{name}.wav,1,0,dog,True,1\n"
                                   "CCCCCCCCCCC.wav,1,0,dog,True,1\n"}


def _listings(put, tmp_path, name, start=0, end=4):
    put("", *(f"{folder}{letter * 11}.mp4" for letter in "AC" for folder in ("", "a/", "audio/")))
    put("", "../outside.mp4", "../a/outside.mp4", "../audio/outside.mp4", "/../../outside.mp4")
    for dataset, split, files in _tables(name, start, end):
        for place, text in files.items():
            put(text.encode("utf-8", "surrogateescape"), place)
        yield dataset, list_split(dataset, tmp_path / "raw", split)


@pytest.mark.parametrize("name", [
    "../outside", "../../outside", "..", ".", "/etc/passwd", "OUTSIDE", "a/../../outside", "..\\outside", "~/x", "-rf",
    "$(touch touched)", "`touch touched`", ";touch touched;", "|touch touched", "&& touch touched", "%s%n", "{0}",
    "x\0y", "\x1b[2J", "*", "?", "[A]", "n" * 5000, "\udcff\udcfe", "AAAAAAAAAAA/../AAAAAAAAAAA"])
def test_an_id_is_never_a_path(put, tmp_path, name):
    name = name.replace("OUTSIDE", str(tmp_path / "outside"))
    for dataset, listing in _listings(put, tmp_path, name):
        assert {source.place.rpartition("/")[2][:11] for source in listing.sources} == {"A" * 11, "C" * 11}, dataset
        assert all(".." not in source.place and (tmp_path / "raw") in source.path.resolve().parents
                   for source in listing.sources)
        assert len(listing.skipped) <= 1, dataset  # a slash may make another class of it, or the same video
    assert not list(tmp_path.rglob("touched"))


@pytest.mark.parametrize(("start", "end"), [
    ("4", "0"), ("4", "4"), ("-1", "4"), ("nan", "nan"), ("inf", "inf"), ("0", "-inf"), ("0", "1e999"), ("x", "4"),
    ("", ""), ("0x10", "0x20"), ("9" * 400, "9" * 401)])
def test_times_that_are_none_are_a_line_with_file_and_line(put, tmp_path, start, end):
    for dataset, listing in list(_listings(put, tmp_path, "BBBBBBBBBBB", start, end))[:3]:
        assert len(listing.sources) == 2, dataset
        [line] = listing.skipped
        assert line.name.endswith(" line 3") and line.reason in ("a row without usable times", "not a usable row")


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_marks_and_ends_of_lines_change_nothing(put, tmp_path, ending, mark):
    put("", *(f"{folder}{letter * 11}.mp4" for letter in "AC" for folder in ("", "a/", "audio/")))
    for dataset, split, files in _tables("CCCCCCCCCCC", 0, 4):
        for place, text in files.items():
            put(mark + text.replace("\n", ending).encode(), place)
        listing = list_split(dataset, tmp_path / "raw", split)
        assert len(listing.sources) == 2 and [line.reason for line in listing.skipped] == ["listed twice"], dataset


@pytest.mark.parametrize(("name", "row"), [
    ("meta/esc50.csv", "B.wav,1," + "9" * 5000 + ",dog,True,1"), ("meta/esc50.csv", "B.wav,1,٣,dog,True,1"),
    ("meta/esc50.csv", "B.wav,1,-1,dog,True,1")])
def test_numbers_that_are_none(put, tmp_path, name, row):
    put(_ESC50 + "A.wav,1,0,dog,True,1\n" + row + "\n", name)
    put("", "audio/A.wav", "audio/B.wav")
    listing = list_split("esc50", tmp_path / "raw", "fold1")
    assert [source.key for source in listing.sources] == ["A"]
    assert [(line.name, line.reason) for line in listing.skipped] == [("esc50.csv line 3", "not a usable row")]


def test_a_class_list_whose_numbers_are_none(put, tmp_path):
    put(_MIDS + "9" * 5000 + ",/m/2,b\n", "class_labels_indices.csv")
    put("", "eval_segments.csv")
    with pytest.raises(AvprepError, match="class_labels_indices.csv: class_labels_indices.csv line 3 is not index"):
        list_split("audioset", tmp_path / "raw", "eval")


def test_a_million_columns(put, tmp_path):
    put("", "AAAAAAAAAAA.mp4")
    more = "," * 1_000_000
    put("label,youtube_id,time_start,time_end" + more + "\na,AAAAAAAAAAA,0,4" + more + "\na,B,0,4\n", "train.csv")
    listing = list_split("kinetics700", tmp_path / "raw", "train")
    assert [source.key for source in listing.sources] == ["AAAAAAAAAAA_000000_000004"]
    assert [line.name for line in listing.skipped] == ["train.csv line 3"] and len(listing.skipped[0].detail) < 300


def test_a_line_without_an_end_is_not_read_into_memory(put, tmp_path, monkeypatch):
    put("label,youtube_id,time_start,time_end\n", "train.csv")
    with open(tmp_path / "raw/train.csv", "r+b") as file:
        file.seek(0, os.SEEK_END)
        file.truncate(10**12)  # with nothing in it
    monkeypatch.setattr("avprep.datasets.tables._LONGEST_LINE", 1 << 20)
    with pytest.raises(AvprepError, match=r"train.csv: line 2 has 1048576 letters or more: is it a list\?"):
        list_split("kinetics700", tmp_path / "raw", "train")
