"""What all tests share: the project's commands, ffmpeg, and the folder of real media."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from manifest_of import add_manifests

from avprep.media import ffmpeg_path

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("AV_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real media and reference numbers, beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}: real media and reference numbers are not in the repository")
    return SHARED


@pytest.fixture(scope="session")
def media(shared: Path) -> Path:
    """The real videos and recordings."""
    return shared / "media"


@pytest.fixture(scope="session")
def ffmpeg() -> Callable[..., None]:
    """Run ffmpeg with these arguments."""

    def run(*arguments: object) -> None:
        subprocess.run([ffmpeg_path(), "-nostdin", "-loglevel", "error", "-y", *map(str, arguments)], check=True)

    return run


@pytest.fixture(scope="session")
def avprep() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the `avprep` command as a user would, in a process of its own."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "avprep.cli", *map(str, arguments)], capture_output=True,
                              text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]

    return run


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory: pytest.TempPathFactory,
               avprep: Callable[..., subprocess.CompletedProcess[str]]) -> Path:
    """A demo of 10 train and 2 test videos."""
    folder = tmp_path_factory.mktemp("demo") / "raw"
    done = avprep("demo", "--out", folder, "--train", 10, "--test", 2)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def demo_shards(small_demo: Path, avprep: Callable[..., subprocess.CompletedProcess[str]],
                tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its shards: train in ten, test in one or two. To be read only."""
    out = tmp_path_factory.mktemp("shards")
    done = avprep("build", "--dataset", "demo", "--raw", small_demo, "--out", out, "--shard-mb", 0.3, "--split", "all")
    assert done.returncode == 0, done.stderr
    add_manifests(out)
    return out / "demo"
