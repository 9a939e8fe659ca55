"""Shards at an address are used as those in a folder: the same figures, embeddings and pictures."""

import pytest
from small_eval import NETWORK, VIEWS, invoke, results_of, settings

pytestmark = pytest.mark.slow


@pytest.fixture
def address(bucket, demo_shards, tmp_path, monkeypatch):
    """The address of a folder that holds the demo's shards."""
    monkeypatch.setenv("AVTRAIN_CACHE", str(tmp_path / "cache"))
    for path in demo_shards.rglob("*"):
        if path.is_file() and ".build" not in path.parts:
            bucket.pipe_file(f"bucket/shards/demo/{path.relative_to(demo_shards).as_posix()}", path.read_bytes())
    return "s3://bucket/shards"


def _eval(shards, out, task):
    return invoke("eval", "--task", task, "--init", "random", "--preset", "tiny", "--shards", shards, "--out", out,
                  "--cache", out / "features", "--device", "cpu", "--protocol", "knn", *settings([*NETWORK, *VIEWS]))


def test_eval(address, demo_shards, tmp_path):
    found = []
    for name, root in (("there", address), ("here", demo_shards.parent), ("all", address)):
        done = _eval(root, tmp_path / name, "all" if name == "all" else "demo")
        assert done.exit_code == 0, done.output
        found.append(results_of(tmp_path / name / ("demo" if name == "all" else ""))["splits"])
    assert found[0] == found[1] == found[2]
    done = _eval(f"{address}/none", tmp_path / "none", "demo")
    assert done.exit_code == 1 and f"no {address}/none/demo/train/index.json: make it with" in done.output


def test_embed_and_retrieve(address, demo_shards, checkpoint, tmp_path):
    for name, root in (("there", f"{address}/demo"), ("here", demo_shards)):
        for command in (["embed", "--shards", f"{root}/test", "-o", tmp_path / f"{name}.parquet"],
                        ["retrieve", "--shards", root, "-o", tmp_path / f"{name}.png", "--cache", tmp_path / name]):
            done = invoke(*command, "--checkpoint", checkpoint, "--device", "cpu")
            assert done.exit_code == 0, done.output
    for ending in ("parquet", "png"):
        assert (tmp_path / f"there.{ending}").read_bytes() == (tmp_path / f"here.{ending}").read_bytes()
    done = invoke("retrieve", "--shards", address, "--checkpoint", checkpoint, "-o", tmp_path / "x.png")
    assert done.exit_code == 1 and f"--shards {address}: no train/index.json in it" in done.output
