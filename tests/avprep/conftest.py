"""What the tests of listings share: small files to put anywhere, and a build that is read back with tarfile."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest


@pytest.fixture(scope="session")
def short_video(ffmpeg, tmp_path_factory):
    """3 s of moving pictures with sound."""
    path = tmp_path_factory.mktemp("short") / "video.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x48:r=5:d=3", "-f", "lavfi", "-i", "sine=300:r=16000:d=3",
           "-c:v", "libx264", "-preset", "ultrafast", "-shortest", path)
    return path


@pytest.fixture(scope="session")
def short_sound(ffmpeg, short_video, tmp_path_factory):
    """Its sound alone."""
    path = tmp_path_factory.mktemp("short") / "sound.wav"
    ffmpeg("-i", short_video, "-vn", path)
    return path


@pytest.fixture(scope="session")
def silent_video(ffmpeg, short_video, tmp_path_factory):
    """Its pictures alone."""
    path = tmp_path_factory.mktemp("short") / "pictures.mp4"
    ffmpeg("-i", short_video, "-an", "-c:v", "copy", path)
    return path


@pytest.fixture
def put(tmp_path):
    """Copy a file, or write a text, below raw/."""

    def copy(content: Path | str | bytes, *names: str) -> None:
        for name in names:
            path = tmp_path / "raw" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copy(content, path)
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)

    return copy


@pytest.fixture
def build(avprep, tmp_path):
    """Build a split of raw/ and read it back, with nothing of ours."""

    def run(dataset: str, split: str = "train", exit_code: int = 0, *more: object) -> SimpleNamespace:
        done = avprep("build", "--dataset", dataset, "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--split",
                      split, "--workers", 2, *more)
        assert done.returncode == exit_code and "Traceback" not in done.stderr, done.stderr
        built = {path.parent.name: _read(path.parent) for path in sorted((tmp_path / "out").rglob("index.json"))}
        return SimpleNamespace(done=done, splits=built, **(vars(built[split]) if split in built else {}))

    return run


def _read(folder: Path) -> SimpleNamespace:
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    members: list[str] = []
    infos = {}
    for entry in index["shardlist"]:
        with tarfile.open(folder / entry["url"]) as tar:
            for member in tar.getmembers():
                members.append(member.name)
                if member.name.endswith(".json"):
                    infos[member.name[:-5]] = json.load(tar.extractfile(member))
    assert max(Counter(members).values()) == 1
    failures = [json.loads(line) for line in (folder / "failures.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = pq.read_table(folder / "sources.parquet").to_pylist()
    assert sorted((row["name"], row["reason"], row["detail"] or "") for row in rows if row["status"] == "failed") == \
        sorted((line["path"], line["reason"], line["detail"]) for line in failures)
    skipped = [{"path": row["name"], "reason": row["reason"], "detail": row["detail"]} for row in rows
               if row["status"] == "skipped"]
    counts = index["counts"]
    assert counts["sources_found"] == counts["sources_written"] + len(failures) + len(skipped) == len(rows)
    assert sum(row["clips"] for row in rows) == counts["clips"] == len(infos)
    return SimpleNamespace(index=index, infos=infos, classes=index["classes"], counts=counts, failures=failures,
                           skipped=skipped,
                           by_source={info["source"]: info for info in infos.values()})
