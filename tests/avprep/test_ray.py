"""`--executor ray`: a cluster of three nodes that loses one, and errors in a line."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest


def _bytes_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and ".build" not in path.parts}


@pytest.fixture
def three_nodes():
    """A Ray cluster on this machine, of three nodes with a core each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80_000_000})
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    cluster.wait_for_nodes(60)
    yield cluster
    cluster.shutdown()


def _shard_under_way(node):
    """The number of the shard for which a node runs ffmpeg."""
    raylet = node.all_processes["raylet"][0].process.pid
    for process in psutil.Process(raylet).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            scratch = re.search(r"/scratch/1-of-1/(\d{6})-", " ".join(process.cmdline()))
            if scratch:
                return scratch[1]
    return None


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_node_that_is_killed_costs_nothing(small_demo, avprep, three_nodes, tmp_path):
    arguments = ["build", "--dataset", "demo", "--raw", str(small_demo), "--shard-mb", "0.3", "--out"]
    assert avprep(*arguments, tmp_path / "local").returncode == 0
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "avprep.cli", *arguments, str(out), "--executor", "ray", "--ray-address",
         three_nodes.address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lost, attempts, deadline = None, set(), time.monotonic() + 400
    victim, pool = three_nodes.list_all_nodes()[-1], ThreadPoolExecutor(1)
    while process.poll() is None and time.monotonic() < deadline:
        attempts |= {path.name for path in out.glob("demo/train/.build/scratch/*/*")}
        if lost is None and list(out.rglob("*.tar")):
            lost = _shard_under_way(victim)
            if lost is not None:
                # In a thread: it waits until the others know.
                killing = pool.submit(three_nodes.remove_node, victim, allow_graceful=False)
        time.sleep(0.02)
    printed, errors = process.communicate(timeout=10)
    killing.result()
    pool.shutdown()
    assert process.returncode == 0, errors
    assert Counter(name.partition("-")[0] for name in attempts)[lost] == 2  # it was begun anew
    assert _bytes_of(out) == _bytes_of(tmp_path / "local")
    state = out / "demo/train/.build"
    assert not list(out.rglob("*.part")) and not list(state.glob("planner-*")) and not list(state.glob("scratch/*"))
    assert "10 files found = 10 written" in printed
    assert all("build train" in line for line in errors.split("\n") if line.strip())  # nothing of Ray's


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_nodes_that_share_nothing_build_from_a_store_into_it(small_demo, avprep, three_nodes, bucket, s3_server,
                                                             tmp_path):
    """Credentials travel with the tasks; the nodes' environment has none."""
    arguments = ["build", "--dataset", "demo", "--shard-mb", "0.3", "--raw"]
    assert avprep(*arguments, small_demo, "--out", tmp_path / "local").returncode == 0
    for path in small_demo.rglob("*.mp4"):
        bucket.pipe_file(f"bucket/raw/{path.relative_to(small_demo).as_posix()}", path.read_bytes())
    options = {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": s3_server}}
    away = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    done = subprocess.run(
        [sys.executable, "-m", "avprep.cli", *arguments, "s3://bucket/raw", "--out", "s3://bucket/shards", "--executor",
         "ray", "--ray-address", three_nodes.address, "--storage-options", json.dumps(options)],
        capture_output=True, text=True, env=away, check=False)
    assert done.returncode == 0, done.stderr
    stored = {path.removeprefix("bucket/shards/"): bucket.cat_file(path) for path in bucket.find("bucket/shards")
              if "/.build/" not in path}
    assert stored == _bytes_of(tmp_path / "local")


def _without(module, folder):
    """An environment in which a module can't be imported."""
    (folder / f"{module}.py").write_text("raise ImportError('not here')")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_what_is_missing_is_said_in_a_line(small_demo, avprep_process, tmp_path):
    build = ("build", "--dataset", "demo", "--raw", small_demo, "--out", tmp_path / "out", "--executor", "ray")
    absent = avprep_process(*build, env=_without("ray", tmp_path))
    assert "pip install 'avprep-avtrain[ray]'" in absent.stderr
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        nobody = avprep_process(*build, "--ray-address", address)
    assert f"no Ray cluster at {address}" in nobody.stderr
    none = avprep_process(*build, "--ray-address", "auto", env={**os.environ, "RAY_TMPDIR": str(tmp_path)})
    assert "no Ray cluster" in none.stderr
    wrong = avprep_process(*build, "--ray-address", "somewhere")
    assert "HOST:PORT" in wrong.stderr
    unused_option = avprep_process(*build[:-2], "--ray-address", "auto")
    assert "--executor ray" in unused_option.stderr
    for done in (absent, nobody, none, wrong, unused_option):
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
