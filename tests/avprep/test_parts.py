"""`--part I/N` and `merge`: the parts make what an undivided build makes, and nothing else is taken for that."""

import fcntl
import json
import os
import shutil
from dataclasses import replace

import pytest

from avprep.build import BuildOptions, build_split
from avprep.errors import AvprepError
from avprep.parts import find_parts, merge
from avprep.spec import ClipSpec
from avprep.state import Part

CLIPS = 7


def _bytes_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and ".build" not in path.parts}


@pytest.fixture(scope="module")
def raw(short_video, tmp_path_factory):
    """Seven short videos, one of them broken, and a text."""
    folder = tmp_path_factory.mktemp("raw")
    for number in range(CLIPS - 1):
        path = folder / f"class{number % 2}" / f"{number}.mp4"
        path.parent.mkdir(exist_ok=True)
        shutil.copy(short_video, path)
    (folder / "class0" / "broken.mp4").write_text("nothing")
    (folder / "notes.txt").write_text("nothing")
    return folder


@pytest.fixture(scope="module")
def build(raw):
    """Build a part of it (None: the whole) with a clip a shard."""

    def run(out, part, **changes):
        options = BuildOptions("folder", raw, out, ClipSpec(), 2, 1000, 60.0, part=Part(*part) if part else None)
        return build_split(replace(options, **changes), "train")

    return run


@pytest.fixture(scope="module")
def undivided(build, tmp_path_factory):
    out = tmp_path_factory.mktemp("undivided")
    assert build(out, None).shards == CLIPS - 1
    return _bytes_of(out)


@pytest.fixture(scope="module")
def built(build, tmp_path_factory):
    """The three parts in three folders. To be copied, not changed."""
    root = tmp_path_factory.mktemp("parts")
    for number in (1, 2, 3):
        build(root / str(number), (number, 3))
    return root


@pytest.fixture
def parts(built, tmp_path):
    return [shutil.copytree(built / name, tmp_path / name) for name in ("1", "2", "3")]


def _merge(*outs):
    [records] = find_parts(outs)
    return merge(records, outs[0])


def test_three_folders_become_one(parts, undivided):
    assert not [path for out in parts for path in out.rglob("*.parquet")] and not list(parts[0].rglob("index.json"))
    report = _merge(*parts)
    assert _bytes_of(parts[0]) == undivided
    assert (report.found, report.written, report.clips) == (CLIPS + 1, CLIPS - 1, CLIPS - 1)
    _merge(*parts)  # nothing happens
    assert _bytes_of(parts[0]) == undivided and not list(parts[0].rglob("*.part"))


def test_one_folder_with_what_an_earlier_build_left(build, undivided, tmp_path):
    build(tmp_path, None, spec=ClipSpec(fps=8), shard_bytes=1)
    for number in range(1, CLIPS + 3):  # more parts than shards
        build(tmp_path, (number, CLIPS + 2))
    assert build(tmp_path, (2, CLIPS + 2)).new_clips_s == 0
    _merge(tmp_path)
    assert _bytes_of(tmp_path) == undivided
    assert build(tmp_path, None).new_clips_s == 0 and _bytes_of(tmp_path) == undivided


def test_shards_are_copied_where_links_cannot_be(parts, undivided, monkeypatch):
    def refused(*arguments):
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refused)
    [tar] = [path for path in sorted(parts[2].rglob("*.tar"))[-1:]]
    content = tar.read_bytes()
    tar.write_bytes(content[:-1] + b"x")
    with pytest.raises(AvprepError, match=f"{tar.name} is damaged"):
        _merge(*parts)
    tar.write_bytes(content)
    _merge(*parts)
    assert _bytes_of(parts[0]) == undivided
    assert sorted(parts[0].rglob("*.tar"))[-1].stat().st_nlink == 1


def test_gaps_and_doubles_are_named(parts, built):
    with pytest.raises(AvprepError, match=r"no part 2/3; .* --part 2/3"):
        _merge(parts[0], parts[2])
    with pytest.raises(AvprepError, match=f"part 3/3 is there twice, in {parts[2]}.* and in {built}"):
        _merge(*parts, built / "3")
    with pytest.raises(AvprepError, match="no finished part of a build in"):
        find_parts([parts[0] / "folder"])


def test_parts_of_other_builds_are_named(build, raw, parts, tmp_path):
    shutil.rmtree(parts[1])
    build(parts[1], (2, 3), spec=ClipSpec(crf=30), limit=100)
    with pytest.raises(AvprepError, match=r"part 2/3 in .* other settings than part 1/3 .*limit 100 .*crf 30 .* 23"):
        _merge(*parts)
    shutil.rmtree(parts[1])
    build(parts[1], (1, 2))
    with pytest.raises(AvprepError, match="part 1/3 in .* and part 1/2 in .* are of two builds"):
        _merge(*parts)
    shutil.rmtree(parts[1])
    other = shutil.copytree(raw, tmp_path / "raw")
    shutil.copy(other / "class0" / "0.mp4", other / "class0" / "more.mp4")
    build(parts[1], (2, 3), raw=other)
    with pytest.raises(AvprepError, match="part 2/3 in .* another list of files than part 1/3"):
        _merge(*parts)


def test_a_part_that_is_not_whole_is_no_part(build, parts, undivided, monkeypatch):
    tar = next(parts[1].rglob("*.tar"))
    tar.unlink()
    with pytest.raises(AvprepError, match=f"part 2/3 in .* lacks {tar.name}"):
        _merge(*parts)

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("avprep.state.write_whole", killed)
        build(parts[1], (2, 3))
    with pytest.raises(AvprepError, match="no finished part"):
        _merge(*parts)
    build(parts[1], (2, 3))
    _merge(*parts)
    assert _bytes_of(parts[0]) == undivided


def test_several_builds_into_one_folder(avprep_process, raw, parts):
    """Parts that share a shard exclude each other, whatever they are out of."""
    build = ("build", "--dataset", "folder", "--raw", raw, "--out", parts[0], "--shard-mb", 0.001)
    with (parts[0] / "folder/train/.build/lock").open("a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX, *_bytes_locked(Part(2, 3)))
        for refused in (build, (*build, "--part", "2/3"), (*build, "--part", "1/2"), ("merge", *parts)):
            done = avprep_process(*refused)
            assert done.returncode == 1 and "another avprep build" in done.stderr, done.stderr
            assert "Traceback" not in done.stderr
        done = avprep_process(*build, "--part", "1/3")
        assert done.returncode == 0 and f"avprep merge {parts[0]}" in done.stdout, done.stderr


def _bytes_locked(part):
    mine = part.within(1 << 40)
    return len(mine), mine.start


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "-1/3", "1/3/3"])
def test_what_is_no_part_is_said(avprep, raw, tmp_path, text):
    done = avprep("build", "--dataset", "folder", "--raw", raw, "--out", tmp_path, f"--part={text}")
    assert done.returncode == 1 and f"--part {text}" in done.stderr and not list(tmp_path.iterdir())


def test_the_commands(avprep, raw, parts, undivided):
    done = avprep("merge", *parts)
    assert done.returncode == 0, done.stderr
    assert "folder train, 3 parts: 8 files found = 6 written + 1 (1 not named like a media file)" in done.stdout
    assert json.loads((parts[0] / "folder/train/index.json").read_text())["counts"]["clips"] == CLIPS - 1
    done = avprep("merge", *parts[1:])
    assert done.returncode == 1 and "no part 1/3" in done.stderr and "Traceback" not in done.stderr
