"""One listing for all datasets: every source under a key of its own, the best of several files, fixed class lists."""

import itertools

import pytest

from avprep.datasets import DATASETS, list_split
from avprep.datasets.files import is_media
from avprep.datasets.tables import read_csv

KINETICS = "label,youtube_id,time_start,time_end,split\n"
AUDIOSET_CLASSES = 'index,mid,display_name\n0,/m/1,"Speech"\n1,/m/2,"Male speech, man"\n'
ESC50 = "filename,fold,target,category,esc10,src_file,take\n"


def _keys(tmp_path, dataset="folder", split="train"):
    sources = list_split(dataset, tmp_path / "raw", split).sources
    assert len({source.key for source in sources}) == len(sources)
    return {source.name: source.key for source in sources}


# --- keys

def test_files_of_one_name_become_clips_of_their_own(put, build, short_video, short_sound):
    put(short_video, "x.mp4", "y.mp4", "x-0000.mp4")
    put(short_sound, "x.wav", "x.WAV", "x.flac")
    built = build("folder")
    assert len(built.infos) == built.counts["sources_written"] == 6
    assert built.by_source["x.mp4"]["missing"] == [] and built.by_source["x.wav"]["missing"] == ["picture"]
    assert {"y-0000", "x-0000-0000"} <= set(built.infos) and "x-0000" not in built.infos


def test_a_key_is_marked_only_where_it_would_not_be_unique(put, tmp_path):
    put("", "x.mp4", "y.mp4", "a b.mp4")
    alone = _keys(tmp_path)
    assert alone["x.mp4"] == "x" and alone["y.mp4"] == "y"
    put("", "x.wav")
    two = _keys(tmp_path)
    assert {name: two[name] for name in ("y.mp4", "a b.mp4")} == {name: alone[name] for name in ("y.mp4", "a b.mp4")}
    assert two["x.mp4"] != "x" != two["x.wav"]
    put("", "0.mp4", "x.mkv", "z/x.mp4")
    assert {name: key for name, key in _keys(tmp_path).items() if name in two} == two  # whatever else is there
    # Files that are named like keys that were altered or marked.
    put("", *(f"{key}.mp4" for key in _keys(tmp_path).values()))
    put("", *(f"{key}.mov" for key in _keys(tmp_path).values()))
    assert len(_keys(tmp_path)) > 20


def test_keys_that_are_cut_short_and_names_alike_but_for_bytes_differ(put, tmp_path):
    put("", "n" * 200 + "a.mp4", "n" * 200 + "b.mp4", "caf\udce9/x.mp4", "caf\\xe9/x.mp4", "-x.mp4", "x.mp4", "x .mp4")
    sources = list_split("folder", tmp_path / "raw", "train").sources
    assert len({source.key for source in sources}) == 7 and all(len(source.key) <= 80 for source in sources)


def test_one_name_in_two_folders_of_a_dataset_without_folders_in_its_keys(put, tmp_path):
    put("1 Archery\n2 Biking\n", "ucfTrainTestlist/classInd.txt")
    put("Archery/1.avi 1\nBiking/1.avi 2\nBiking/2.avi 2\n", "ucfTrainTestlist/trainlist01.txt")
    put("", "UCF-101/Archery/1.avi", "UCF-101/Biking/1.avi", "UCF-101/Biking/2.avi")
    assert _keys(tmp_path, "ucf101", "train1")["UCF-101/Biking/2.avi"] == "2"
    put("", "001 - Dog/1-1-A.ogg", "002 - Cat/1-1-A.ogg", "002 - Cat/1-1-A.wav", "002 - Cat/1-2-A.wav")
    keys = _keys(tmp_path, "esc10", "fold1")
    assert len(keys) == 4 and keys["002 - Cat/1-2-A.wav"] == "1-2-A"


def test_scratch_files_differ_where_a_file_system_takes_a_for_A(put, tmp_path, monkeypatch, short_video):
    import avprep.build as building
    from avprep import making
    from avprep.spec import ClipSpec

    put(short_video, "a.mp4", "A.mp4")
    scratch, make_clip = [], making.make_clip

    def noting(window, spec, dataset, split, path, timeout_s):
        scratch.append(path.name.casefold())
        return make_clip(window, spec, dataset, split, path, timeout_s)

    monkeypatch.setattr(making, "make_clip", noting)
    building.build_split(building.BuildOptions("folder", tmp_path / "raw", tmp_path, ClipSpec(), 1, 10**6, 60), "train")
    assert len(set(scratch)) == len(scratch) == 2


def _lists_with_an_entry_twice(put):
    put(KINETICS + "a,AAAAAAAAAAA,0,4,train\n" * 2, "train.csv")
    put("", "AAAAAAAAAAA.mp4")
    yield "kinetics700", "train"
    put(AUDIOSET_CLASSES, "class_labels_indices.csv")
    put('# x\nAAAAAAAAAAA, 0.0, 4.0, "/m/1"\nAAAAAAAAAAA, 0.0, 4.0, "/m/2"\n', "eval_segments.csv")
    yield "audioset", "eval"
    put("1 A\n", "ucfTrainTestlist/classInd.txt")
    put("A/1.avi 1\na/1.avi 1\n", "ucfTrainTestlist/trainlist01.txt")
    put("", "UCF-101/A/1.avi")
    yield "ucf101", "train1"
    put(ESC50 + "1-1-A-0.wav,1,0,dog,True,1,A\n" * 2, "meta/esc50.csv")
    put("", "audio/1-1-A-0.wav")
    yield "esc50", "fold1"
    put("c0 a\n", "Charades/Charades_v1_classes.txt")
    put("id,actions\nAAAAA,c0 0 1\nAAAAA,c0 0 1\n", "Charades/Charades_v1_train.csv")
    put("", "Charades_v1_480/AAAAA.mp4")
    yield "charades", "train"


def test_a_comma_at_the_end_of_a_row_does_no_harm_and_another_value_does(tmp_path):
    for header, row, values in (("file,class", "a,b,", ("a", "b")), ("file,class,", " a ,b,", ("a", "b")),
                                ("class,file", "b,a,,", ("a", "b")), ("file,class", "a,b,c", None),
                                ("file,more,class", "a,,", ("a", "")), ("file,class", "a", None)):
        (tmp_path / "list.csv").write_text(f"{header}\n{row}\n")
        problems = []
        assert [found.values for found in read_csv(tmp_path / "list.csv", ("file", "class"), problems)] == (
            [values] if values else [])
        assert len(problems) == (not values)


def test_what_is_listed_twice_is_taken_once(put, tmp_path):
    for dataset, split in _lists_with_an_entry_twice(put):
        listing = list_split(dataset, tmp_path / "raw", split)
        assert len(listing.sources) == 1 and [entry.reason for entry in listing.skipped] == ["listed twice"], dataset


# --- several files for one id

def test_kinetics_takes_the_best_of_several_files(put, build, short_video, short_sound, silent_video):
    put(KINETICS + "".join(f"a,{letter * 11},0,4,train\n" for letter in "ABCDEF"), "train.csv")
    put("broken", "train/AAAAAAAAAAA_000000_000004.mp4")
    put(short_video, "AAAAAAAAAAA.mkv")  # the whole video in place of its broken clip
    put(short_video, "a/BBBBBBBBBBB_000000_000004.mp4", "replacement_for_corrupted/BBBBBBBBBBB_000000_000004.mp4")
    put(silent_video, "CCCCCCCCCCC.f137.mp4")  # what a download tool leaves
    put(short_sound, "CCCCCCCCCCC.f140.wav", "DDDDDDDDDDD.wav", "FFFFFFFFFFF.wav")
    put("WEBVTT", "CCCCCCCCCCC.en.vtt", "CCCCCCCCCCC.jpg", "CCCCCCCCCCC.mp4.part")
    put("broken", "EEEEEEEEEEE.mp4", "EEEEEEEEEEE.webm")
    put(silent_video, "0/FFFFFFFFFFF.mp4")
    put(short_video, "1/FFFFFFFFFFF.mp4")
    built = build("kinetics400")
    assert set(built.by_source) == {"AAAAAAAAAAA.mkv", "replacement_for_corrupted/BBBBBBBBBBB_000000_000004.mp4",
                                    "CCCCCCCCCCC.f137.mp4", "DDDDDDDDDDD.wav", "1/FFFFFFFFFFF.mp4"}
    assert {line["path"]: line["detail"] for line in built.skipped} == {
        "train/AAAAAAAAAAA_000000_000004.mp4": "AAAAAAAAAAA.mkv was taken; this one: not a readable media file",
        "a/BBBBBBBBBBB_000000_000004.mp4": "replacement_for_corrupted/BBBBBBBBBBB_000000_000004.mp4 was taken",
        "CCCCCCCCCCC.f140.wav": "CCCCCCCCCCC.f137.mp4 was taken",
        "EEEEEEEEEEE.webm": "EEEEEEEEEEE.mp4 was taken; this one: not a readable media file",
        "0/FFFFFFFFFFF.mp4": "1/FFFFFFFFFFF.mp4 was taken", "FFFFFFFFFFF.wav": "1/FFFFFFFFFFF.mp4 was taken"}
    assert {line["reason"] for line in built.skipped} == {"another file of its id was taken"}
    assert [line["path"] for line in built.failures] == ["EEEEEEEEEEE.mp4"]
    assert "AAAAAAAAAAA_000000_000004-0000" in built.infos  # the key is the row's, whichever file is taken


def test_a_file_that_one_row_takes_is_not_left_by_another(put, build, short_video):
    put(KINETICS + "a,AAAAAAAAAAA,0,1,train\na,AAAAAAAAAAA,1,2,train\n", "train.csv")
    put(short_video, "AAAAAAAAAAA.mp4", "AAAAAAAAAAA_000000_000001.mp4")
    built = build("kinetics600")
    assert len(built.infos) == 2 and built.skipped == []


def test_audioset_takes_the_video_and_the_file_of_the_right_moment(put, build, short_video, short_sound):
    put(AUDIOSET_CLASSES, "class_labels_indices.csv")
    put('# x\n-AAAAAAAAAA, 30.0, 40.0, "/m/1"\nEEEEEEEEEEE, 30.0, 40.0, "/m/2,/m/2"\nEEEEEEEEEEE, 70.0, 80.0, "/m/1"\n',
        "eval_segments.csv")
    put(short_sound, "audio/-AAAAAAAAAA.wav", "EEEEEEEEEEE_70000_80000.wav")
    put(short_video, "video/Y-AAAAAAAAAA.mp4", "EEEEEEEEEEE_30.000_40.000.mp4")
    built = build("audioset", "eval")
    assert {name: info["labels"] for name, info in built.by_source.items()} == {
        "video/Y-AAAAAAAAAA.mp4": [0], "EEEEEEEEEEE_30.000_40.000.mp4": [1], "EEEEEEEEEEE_70000_80000.wav": [0]}
    assert [line["path"] for line in built.skipped] == ["audio/-AAAAAAAAAA.wav"]
    assert built.counts["clips_per_class"] == [2, 1]  # a label that stands twice counts once


def test_ucf101_and_charades_find_copies_with_another_ending(put, build, short_video):
    put("1 Archery\n2 HandstandPushups\n", "ucfTrainTestlist/classInd.txt")
    put("\ufeffArchery/v_1.avi 1\r\nHandStandPushups/v_2.avi 2\r\nArchery\\v_3.avi 1\r\n",
        "ucfTrainTestlist/trainlist01.txt")
    put(short_video, "UCF-101/Archery/v_1.mp4", "UCF-101/HandstandPushups/v_2.mkv", "UCF-101/Archery/v_3.avi",
        "UCF-101/Archery/v_3.mp4", "Charades_v1/AAAAA.mkv", "Charades_v1/BBBBB.mp4", "Charades_v1_480/BBBBB.mp4")
    built = build("ucf101", "train1")
    assert {key: info["labels"] for key, info in built.infos.items()} == {
        "v_1-0000": [0], "v_2-0000": [1], "v_3-0000": [0]}
    assert [line["path"] for line in built.skipped] == ["UCF-101/Archery/v_3.mp4"]
    put("c0 a\n", "Charades_v1_classes.txt")
    put("id,actions\nAAAAA,c0 0 1\nBBBBB,\n", "Charades_v1_train.csv")
    put("broken", "Charades_v1_480/AAAAA.mp4")
    built = build("charades")
    assert set(built.by_source) == {"Charades_v1/AAAAA.mkv", "Charades_v1_480/BBBBB.mp4"}
    assert {line["path"] for line in built.skipped} == {"Charades_v1_480/AAAAA.mp4", "Charades_v1/BBBBB.mp4"}


# --- class lists

def test_kinetics_has_one_class_list_for_all_splits(put, tmp_path):
    put(KINETICS + "b,AAAAAAAAAAA,0,4,train\nc ,BBBBBBBBBBB,0,4,train\ncut,CCCCCCC\n", "annotations/train.csv")
    put(KINETICS + " c,DDDDDDDDDDD,0,4,val\na,EEEEEEEEEEE,0,4,val\n", "annotations/kinetics-400_Val.csv")
    put("youtube_id,time_start,time_end\nFFFFFFFFFFF,0,4\n", "test.csv")
    put("", *(f"{letter * 11}.mp4" for letter in "ABDEF"))
    assert DATASETS["kinetics400"].splits(tmp_path / "raw") == ("train", "val", "test")
    for split, labels in (("train", [1, 2]), ("val", [2, 0]), ("test", [])):
        listing = list_split("kinetics400", tmp_path / "raw", split)
        assert listing.classes == ["a", "b", "c"]
        assert [label for source in listing.sources for label in source.labels] == labels


def test_what_systems_leave_behind_and_empty_folders_are_no_classes(put, tmp_path):
    put("", "train/cat/1.mp4", "train/__MACOSX/cat/1.mp4", "train/@eaDir/1.mp4", "train/lost+found/1.mp4",
        "train/.cache/1.mp4", "train/cat/@eaDir/1.mp4/1.mp4", "val/dog/deep/down/1.WMV", "__MACOSX/train/1.mp4",
        "train/notes/readme.txt", "val/cat/1.jpg")
    (tmp_path / "raw/train/empty").mkdir()
    listing = list_split("folder", tmp_path / "raw", "train")
    assert listing.classes == ["cat", "dog"] and [source.name for source in listing.sources] == ["train/cat/1.mp4"]
    assert [entry.name for entry in listing.skipped] == ["train/notes/readme.txt"]


def test_an_action_at_two_times_is_one_label(put, build, short_video):
    put("c0 a\nc1 b\n", "Charades_v1_classes.txt")
    put("id,actions\nAAAAA,c1 0.5 1;c0 0 9;c1 2 3;c1 50 60\n", "Charades_v1_train.csv")
    put(short_video, "Charades_v1_480/AAAAA.mp4")
    built = build("charades")
    info = built.infos["AAAAA-0000"]
    assert (info["labels"], info["label_times_s"]) == ([1, 0], [[0.5, 1, 2, 3], [0, 9]])
    assert built.counts["clips_per_class"] == [1, 1]


# --- splits

@pytest.mark.parametrize(("names", "found"), [
    (["train/a/1.mp4", "validation/a/1.mp4"], {"train": ["a"], "val": ["a"]}),
    (["Train/a/1.mp4", "TEST/a/1.mp4"], {"train": ["a"], "test": ["a"]}),
    (["training/a/1.mp4", "Valid/b/1.mp4", "testing/a/1.mp4"], {"train": ["a", "b"], "val": ["a", "b"],
                                                              "test": ["a", "b"]}),
    (["bus/1.mp4", "plane/1.mp4", "train/1.mp4"], {"train": ["bus", "plane", "train"]}),
    (["dev/1.mp4", "plane/1.mp4", "Training/1.mp4"], {"train": ["Training", "dev", "plane"]}),
    (["train/1.mp4"], {"train": []}),
    (["train/1.mp4", "extra.mp4"], {"train": []}),
])
def test_split_folders_under_other_names_are_splits_and_classes_are_classes(put, tmp_path, names, found):
    put("", *names)
    assert {split: list_split("folder", tmp_path / "raw", split).classes
            for split in DATASETS["folder"].splits(tmp_path / "raw")} == found
    sources = itertools.chain(*(list_split("folder", tmp_path / "raw", split).sources for split in found))
    assert sorted(source.name for source in sources) == sorted(set(names) - {"extra.mp4"})


def test_nothing_beside_split_folders_goes_unmentioned(put, build, short_video):
    put(short_video, "train/a/1.mp4", "validation/a/1.mp4", "more/1.mp4", "loose.mp4")
    put("a list", "list.csv")
    built = build("folder", "all")
    assert set(built.splits) == {"train", "val"}
    for split in built.splits.values():
        assert {(line["path"], line["reason"]) for line in split.skipped} == {
            ("more", "beside the split folders"), ("loose.mp4", "beside the split folders")}
    wrong = build("folder", "Validation", 1)
    assert "has train, val; or say --split all (did you mean val?)" in wrong.done.stderr


def test_an_empty_split_does_not_keep_the_others_from_being_built(put, build, tmp_path, short_video):
    put(short_video, "train/a/1.mp4", "test/a/1.mp4")
    (tmp_path / "raw/val").mkdir()
    built = build("folder", "all")
    assert set(built.splits) == {"train", "test"} and "folder val: no media files" in built.done.stderr
    assert "the folder holds none" in build("folder", "val", 1).done.stderr


# --- endings

def test_every_ending_that_libav_reads_is_media_and_what_is_plainly_none_is_not(tmp_path):
    taken = ("mp4 MKV webm avi mov flv m4v mpg mpeg 3gp ts wmv mts m2ts ogv vob mxf f4v asf gif rm rmvb dv divx m2v "
             "nut wav flac ogg mp3 m4a opus aac wma aiff aif aifc oga mka caf au amr ac3 wv ape w64 mp2 spx tta dts")
    left = "txt srt ass vtt json csv png jpg jpeg gif.part nfo xml m3u8 js bin raw yuv zip tar py md npy"
    assert [ending for ending in taken.split() if not is_media(tmp_path / f"x.{ending}")] == []
    assert [ending for ending in left.split() if is_media(tmp_path / f"x.{ending}")] == []


def test_containers_of_other_endings_are_built(put, build, ffmpeg, short_video, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    names = {"a.vob": ["-c:v", "mpeg2video", "-c:a", "mp2"], "b.asf": ["-c:v", "wmv2", "-c:a", "wmav2"],
             "c.f4v": ["-c", "copy"], "d.M2TS": ["-c", "copy", "-f", "mpegts"], "e.caf": ["-vn"], "f.au": ["-vn"],
             "g.AIFC": ["-vn", "-f", "aiff"], "h.gif": ["-an"]}
    for name, options in names.items():
        ffmpeg("-i", short_video, "-r", 25, *options, raw / name)
    built = build("folder")
    assert set(built.by_source) == set(names) and built.failures == built.skipped == []
