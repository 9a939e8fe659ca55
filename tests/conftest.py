"""What all tests share: the project's commands, ffmpeg, the small demo, real media and what stands in for it."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read when numpy and torch are imported, here and in processes of their own: what tests compute is small, threads would
# wait for each other, and results are compared between processes.
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import fsspec  # noqa: E402

# A shell ignores Ctrl-C for what it runs in the background, and tests send it to processes that they begin.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
from click.testing import CliRunner  # noqa: E402
from made_media import make_media  # noqa: E402

from avprep.cli import main  # noqa: E402
from avprep.media import ffmpeg_path  # noqa: E402

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("AV_SHARED", ROOT.parent / "shared"))
Done = subprocess.CompletedProcess[str]
# What a test waits seconds for: media, shards, a process that loads everything anew, the paper's network.
COSTLY = {"s3_server", "ffmpeg", "avprep", "avprep_process", "made_once", "released_state"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is fast: it needs nothing costly, and is not marked as taking seconds itself."""
    for item in items:
        needed = set(getattr(item, "fixturenames", ()))
        if not needed & COSTLY and not any(item.get_closest_marker(name) for name in ("seconds", "slow")):
            item.add_marker("fast")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real media and reference numbers, beside the checkout."""
    if not all((SHARED / name).is_dir() for name in ("media", "reference")):
        pytest.skip(f"no {SHARED}: real media and reference numbers are not in the repository")
    return SHARED


@pytest.fixture(scope="module", params=["excerpt", "whole"])
def reference_folder(request: pytest.FixtureRequest) -> Path:
    """What the authors' code computed: an excerpt that is stored beside the tests, and all of it where that is."""
    folder: Path = ROOT / "tests" if request.param == "excerpt" else request.getfixturevalue("shared")
    return folder / "reference"


# What stands in for the real media is tried by `make test` where they aren't there.
@pytest.fixture(scope="module", params=[
    pytest.param("made", marks=[pytest.mark.slow] if (SHARED / "media").is_dir() else []), "real"])
def media(request: pytest.FixtureRequest, ffmpeg: Callable[..., None], made_once: Callable[..., Path]) -> Path:
    """Videos and recordings of many kinds: made ones, and the real ones where they are."""
    if request.param == "real":
        folder: Path = request.getfixturevalue("shared")
        return folder / "media"
    return made_once("media", lambda folder: make_media(ffmpeg, folder))


@pytest.fixture(scope="module", params=["made", pytest.param("real", marks=pytest.mark.slow)])
def esc10(request: pytest.FixtureRequest, ffmpeg: Callable[..., None], made_once: Callable[..., Path]) -> Path:
    """ESC-10: a made recording of each class in each fold, and all the real ones, which takes half a minute."""
    if request.param == "real":
        folder: Path = request.getfixturevalue("shared")
        return folder / "media" / "esc10"
    return made_once("media", lambda folder: make_media(ffmpeg, folder)) / "esc10"


@pytest.fixture(scope="session")
def ffmpeg() -> Callable[..., None]:
    """Run ffmpeg with these arguments."""

    def run(*arguments: object) -> None:
        subprocess.run([ffmpeg_path(), "-nostdin", "-loglevel", "error", "-y", *map(str, arguments)], check=True)

    return run


@pytest.fixture(scope="session")
def avprep() -> Callable[..., Done]:
    """Run the `avprep` command as a user would, but in this process, where torch and librosa are loaded already."""

    def run(*arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> Done:
        before = Path.cwd()
        os.chdir(cwd or before)
        try:
            result = CliRunner().invoke(main, list(map(str, arguments)), env=env)
        finally:
            os.chdir(before)
        errors = result.stderr
        if result.exception and not isinstance(result.exception, SystemExit):
            errors += "".join(traceback.format_exception(result.exception))
        return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, errors)

    return run


@pytest.fixture(scope="session")
def avprep_process() -> Callable[..., Done]:
    """The same in a process of its own, two seconds slower: for what depends on PATH, or on nothing being loaded."""

    def run(*arguments: object, env: dict[str, str] | None = None) -> Done:
        return subprocess.run([sys.executable, "-m", "avprep.cli", *map(str, arguments)], capture_output=True,
                              text=True, check=False, env=env)

    return run


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A folder that one of all processes of tests fills, for all to read: made_once(name, fill)."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def folder_of(name: str, fill: Callable[[Path], object]) -> Path:
        folder, is_whole = root / "made_once" / name, root / "made_once" / f"{name}.whole"
        folder.parent.mkdir(exist_ok=True)
        with (folder.parent / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_whole.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of an attempt that failed
                folder.mkdir()
                fill(folder)
                is_whole.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def small_demo(made_once: Callable[..., Path], avprep: Callable[..., Done]) -> Path:
    """A demo of 10 train and 2 test videos. To be read only."""

    def fill(folder: Path) -> None:
        done = avprep("demo", "--out", folder / "raw", "--train", 10, "--test", 2)
        assert done.returncode == 0, done.stderr

    return made_once("demo", fill) / "raw"


@pytest.fixture(scope="session")
def tiny_demo(small_demo: Path, made_once: Callable[..., Path]) -> Path:
    """Six of its videos, four to train with, of four classes. To be read only."""

    def fill(folder: Path) -> None:
        for path in (*small_demo.glob("train/*/000[0-3].mp4"), *small_demo.glob("test/*/*.mp4")):
            place = folder / path.relative_to(small_demo)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)

    return made_once("tiny_demo", fill)


@pytest.fixture(scope="session")
def demo_shards(small_demo: Path, made_once: Callable[..., Path], avprep: Callable[..., Done]) -> Path:
    """Its shards, made by one worker: train in ten, test in one or two. To be read only."""

    def fill(folder: Path) -> None:
        done = avprep("build", "--dataset", "demo", "--raw", small_demo, "--out", folder, "--shard-mb", 0.3, "--split",
                      "all", "--workers", 1)
        assert done.returncode == 0, done.stderr

    return made_once("shards", fill) / "demo"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server (moto's) on loopback, in a process of its own."""
    code = ("import time; from moto.server import ThreadedMotoServer\n"
            "server = ThreadedMotoServer('127.0.0.1', 0, verbose=False); server.start()\n"
            "print(server.get_host_and_port()[1], flush=True); time.sleep(3600)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.kill()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The store of an empty bucket named `bucket`; the environment has what s3:// needs."""
    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "word", "AWS_DEFAULT_REGION": "us-east-1",
                        "AWS_ENDPOINT_URL": s3_server}.items():
        monkeypatch.setenv(name, value)
    store = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
    store.clear_instance_cache()  # of a test before, with another endpoint or none of these settings
    store.mkdir("bucket")
    yield store
    store.rm("bucket", recursive=True)
