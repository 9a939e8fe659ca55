"""Hundreds of bad files in one build: each is clips, or one line of the account, and none costs time or memory."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import zoo

from avprep.datasets.source import printable
from avprep.headers import read_header

_MOST_BYTES = 1.5e9
_LONGEST_S = 1800


def _check(folder, expected):
    """The account of a build: {name: outcome}."""
    rows = pq.read_table(folder / "sources.parquet").to_pylist()
    assert sorted(row["name"] for row in rows) == sorted(map(printable, expected))
    outcomes = {row["name"]: row["status"] if row["status"] == "written" else row["reason"] for row in rows}
    wrong = {name: outcomes[printable(name)] for name, outcome in expected.items()
             if outcome not in (zoo.ANY, outcomes[printable(name)])}
    assert wrong == {}
    failures = [json.loads(line) for line in (folder / "failures.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["path"] for line in failures} == {row["name"] for row in rows if row["status"] == "failed"}
    counts = json.loads((folder / "index.json").read_text(encoding="utf-8"))["counts"]
    skipped, failed = (sum(counts[f"sources_{what}"].values()) for what in ("skipped", "failed"))
    assert counts["sources_found"] == counts["sources_written"] + skipped + failed == len(expected)
    assert counts["clips"] == sum(row["clips"] for row in rows)
    assert {row["name"] for row in rows if row["status"] == "written"} <= {row["name"] for row in rows if row["clips"]}
    return outcomes


def test_ten_of_the_zoo(short_video, build, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    wanted = {"empty.mp4", "html.mp4", "concat.mp4", "bomb4294967280.mov", "stsz-ffffffff.mp4", "16384.mp4", "nan.wav",
              "good-cut5.mp4", "good-headonly.mp4", "deep.mp4"}
    mp4 = short_video.read_bytes()
    expected = dict(zoo.put_no_files(raw))
    for name, content, outcome in (*zoo.text_kinds(), *zoo.table_kinds(mp4), *zoo.picture_kinds(), *zoo.sound_kinds(),
                                   *zoo.damaged_kinds("good.mp4", mp4), ("-i\n.mp4", mp4, zoo.WRITTEN)):
        if name in wanted or outcome == zoo.WRITTEN and name.startswith("-"):
            (raw / name).write_bytes(content)
            expected[name] = outcome
    build("folder")
    outcomes = _check(tmp_path / "out/folder/train", expected)
    assert [name for name, outcome in outcomes.items() if outcome == "written"] == ["-i\n.mp4"]


@pytest.mark.slow
def test_the_whole_zoo(ffmpeg, tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    media = Path(os.environ.get("AV_SHARED", Path(__file__).parents[3] / "shared")) / "media"
    expected = zoo.put_zoo(ffmpeg, raw, [path for name in ("av1.mkv", "h265.mp4") if (path := media / name).is_file()])
    assert len(expected) >= 300
    done = subprocess.run([sys.executable, "-m", "avprep.cli", "build", "--dataset", "folder", "--raw", raw, "--out",
                           out, "--workers", "2", "--timeout", "60"], capture_output=True, text=True,
                          timeout=_LONGEST_S)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    outcomes = _check(out / "folder/train", expected)
    assert not {"time-out", "ffmpeg was killed"} & set(outcomes.values()), outcomes
    # The largest of all processes that this one's children waited for: readers of headers and ffmpegs among them.
    assert 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < _MOST_BYTES
    checked = subprocess.run([sys.executable, "-m", "avprep.cli", "verify", out], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user; others have a test of their own")
def test_files_that_another_user_may_not_read(short_video):
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        (folder / "closed.mp4").write_bytes(short_video.read_bytes())
        (folder / "closed.mp4").chmod(0o600)
        os.seteuid(65_534)
        try:
            found = read_header(folder / "closed.mp4")
        finally:
            os.seteuid(0)
        assert str(found) == "probe: can't be opened (Permission denied)"
    finally:
        shutil.rmtree(folder)
