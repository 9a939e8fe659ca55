"""Shards over http from a server that misbehaves: what passes is waited for, what does not is said in a line."""

import hashlib
import http.server
import multiprocessing
import os
import signal
import threading
import time
from email.utils import formatdate
from urllib.parse import urlsplit

import pytest
from filelock import FileLock
from small_eval import invoke

from avtrain.data import storage as module
from avtrain.data.cache import kept
from avtrain.data.handover import begin
from avtrain.data.shards import ShardReader, open_folders
from avtrain.data.storage import beside, fetch_json, has_index, index_address, shown
from avtrain.errors import AvtrainError

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class _Server(http.server.ThreadingHTTPServer):
    """Files by path; `faults` are used up, one a request; `seen` are the requests' paths and first bytes."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.faults, self.seen, self.times_s = files, [], [], []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that hangs up is what is tried here."""


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server, path = self.server, urlsplit(self.path).path
        first = int(self.headers.get("Range", "bytes=0-")[6:-1])
        server.seen.append((self.path, first))
        server.times_s.append(time.monotonic())
        fault = server.faults.pop(0) if server.faults else "good"
        content = server.files.get(path)
        if content is None:
            fault = 404
        if isinstance(fault, tuple):
            return self._answer(fault[0], {"Retry-After": fault[1]})
        if isinstance(fault, int):
            return self._answer(fault)
        if fault == "reset":
            return self.connection.close()
        if fault == "other":
            content = content[::-1]
        if fault == "longer":
            content += b"more"
        if fault == "half file":
            content = content[:len(content) // 2]
        if first >= len(content):
            return self._answer(416)
        ranged = first and fault != "no ranges"
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            content = content[first:]
        if fault != "unknown length":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault in ("closes early", "unknown length", "stalls"):
            content = content[:len(content) // 2]
        if fault == "trickles":
            for number in range(20):
                self.wfile.write(content[number:number + 1])
                time.sleep(0.05)
            return None
        self.wfile.write(content)
        if fault in ("stalls", "closes early"):  # what was sent is handed on before it breaks
            self.wfile.flush()
            time.sleep(1 if fault == "stalls" else 0.2)
        return None

    def _answer(self, status, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Start a server; waiting is short, the cache empty."""
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(module, "STALL_S", 0.3)
    monkeypatch.setenv("AVTRAIN_CACHE", str(tmp_path / "cache"))
    servers = []

    def start(files):
        server = _Server(files)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(serve):
    return serve({"/a/s.tar": CONTENT, "/a/index.json": b'{"a": 1}'})


def _fetched(server):
    return kept(f"{server.address}/a/s.tar", len(CONTENT), SHA256)


def _cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_file())


@pytest.mark.parametrize("faults", [
    [503], [500, 502, 504, 429], ["reset"], ["closes early"], ["closes early", "closes early", 503], ["unknown length"],
    ["stalls"], ["closes early", "no ranges"], ["half file"], ["half file", 416], ["other"], ["longer"],
    ["closes early", "other"]])
def test_what_passes_is_tried_again(server, tmp_path, faults):
    server.faults += faults
    assert _fetched(server).read_bytes() == CONTENT
    assert _cached(tmp_path) == [f"{SHA256}.tar"]
    assert len(server.seen) == len(faults) + (faults[-1] != "no ranges")  # there the second answer is all of it
    requests = len(server.seen)
    assert _fetched(server).read_bytes() == CONTENT and len(server.seen) == requests  # from the cache


def test_what_came_is_not_fetched_again(server):
    server.faults += ["closes early"]
    _fetched(server)
    [first, second] = [first for _, first in server.seen]
    assert first == 0 < second <= len(CONTENT) // 2  # aiohttp gives up what it had not yet handed on


@pytest.mark.parametrize(("faults", "tries", "message"), [
    ([503] * 9, 5, "s.tar: the server answers 503 Service Unavailable; given up after 5 tries"),
    ([404], 1, "404 Not Found: is the address right"),
    ([403], 1, "403 Forbidden: is the token"), ([401], 1, "it wants credentials"), ([410], 1, "410 Gone"),
    (["other"] * 9, 2, "its checksum is not the one in its index, at two tries: copy"),
    (["longer"] * 9, 2, "longer than the 1048576 bytes that its index says"),
    (["half file", 416, "half file", 416], 4, "is shorter than its index says"),
    (["stalls", "stalls", "stalls", "stalls", 503], 5, "503")])
def test_what_does_not_pass_is_said_in_a_line_and_leaves_nothing(server, tmp_path, faults, tries, message):
    server.faults += faults
    with pytest.raises(AvtrainError, match=message) as caught:
        _fetched(server)
    assert "\n" not in str(caught.value) and len(server.seen) == tries and _cached(tmp_path) == []


def test_a_server_that_resets_every_connection(server):
    server.faults += ["reset"] * 99
    with pytest.raises(AvtrainError, match="s.tar: the connection broke: .*; given up after 5 tries"):
        _fetched(server)
    assert 5 <= len(server.seen) <= 10  # aiohttp asks once more where a connection was one kept open


def test_a_body_that_trickles_is_a_stall(server, monkeypatch):
    monkeypatch.setattr(module, "TRIES", 1)
    server.faults += ["trickles"]
    with pytest.raises(AvtrainError, match=r"\d bytes came in 0 seconds"):
        _fetched(server)


@pytest.mark.parametrize("form", [str, lambda s: formatdate(time.time() + int(s) + 1, usegmt=True)])
def test_retry_after_is_honoured_within_reason(server, monkeypatch, form):
    server.faults += [(503, form("1"))]
    _fetched(server)
    assert server.times_s[1] - server.times_s[0] > 0.9
    monkeypatch.setattr(module, "LONGEST_WAIT_S", 0.1)
    server.faults += [(429, form("3600")), (503, "nonsense"), (503, "-5")]
    started = time.monotonic()
    assert fetch_json(f"{server.address}/a/index.json") == {"a": 1}
    assert 0.1 <= time.monotonic() - started < 1


@pytest.mark.parametrize("faults", [[503], ["closes early"] * 3, ["reset"], ["unknown length"], ["stalls"]])
def test_an_index_is_waited_for_too(server, faults):
    server.faults += faults
    assert fetch_json(f"{server.address}/a/index.json") == {"a": 1}


def test_waits_grow_and_differ(server, monkeypatch):
    waits_s = []
    monkeypatch.setattr(module.time, "sleep", waits_s.append)
    monkeypatch.setattr(module, "FIRST_WAIT_S", 1.0)
    for _ in range(2):
        server.faults += [503] * 5
        with pytest.raises(AvtrainError):
            fetch_json(f"{server.address}/a/index.json")
    first, second = waits_s[:4], waits_s[4:]
    assert first != second
    assert all(0.5 * 2**number <= wait <= 1.5 * 2**number for one in (first, second) for number, wait in enumerate(one))


def test_a_server_that_is_not_there_and_odd_addresses(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.001)
    for address, message in (("http://127.0.0.1:9", "Connection refused; given up after 5 tries"),
                             ("http://127.0.0.1:nine", "is no address"), ("http://[::1", "is no address"),
                             ("http://", "is no address")):
        with pytest.raises(AvtrainError, match=message) as caught:
            open_folders([address])
        assert "\n" not in str(caught.value)


def test_addresses_keep_their_query_and_messages_leave_it_out():
    for folder in ("https://h/a?token=x", "https://h/a/?token=x", "https://h/a/index.json?token=x"):
        assert index_address(folder) == "https://h/a/index.json?token=x"
    assert beside("https://h/a/index.json?token=x&y=/z", "t-0?1.tar") == "https://h/a/t-0%3F1.tar?token=x&y=/z"
    assert index_address("http://h") == "http://h/index.json" and beside("http://h/index.json", "s") == "http://h/s"
    assert shown("https://me:word@h/a?token=x") == "https://h/a?..." and shown("a/b?c") == "a/b?c"


@pytest.fixture
def remote(serve, demo_shards):
    """The small demo's training split behind a server that wants a token."""
    server = serve({f"/demo/{path.name}": path.read_bytes() for path in (demo_shards / "train").glob("*.*")
                    if path.is_file()})
    return server, f"{server.address}/demo?token=secret"


def test_a_folder_behind_a_token(remote, demo_shards):
    server, address = remote
    folder = open_folders([address])
    assert ShardReader(folder).read(3, 0) == ShardReader(open_folders([str(demo_shards / "train")])).read(3, 0)
    assert [path for path, _ in server.seen] == [
        f"/demo/{name}?token=secret" for name in ("index.json", "clips.parquet", "train-000003.tar")]
    server.faults += [403]
    with pytest.raises(AvtrainError, match="403") as caught:
        ShardReader(folder).read(4, 0)
    assert "secret" not in str(caught.value)


def test_what_wants_credentials_is_not_taken_for_absent(remote):
    server, location = remote
    assert has_index(location)
    for status in (404, 403):
        server.faults += [status]
        assert not has_index(location)
    server.faults += [401]
    with pytest.raises(AvtrainError, match="it wants credentials"):
        has_index(location)


def test_the_manifest_comes_over_http_like_the_index(demo_shards, serve):
    files = {f"/{path.name}": path.read_bytes() for path in (demo_shards / "train").iterdir() if path.is_file()}
    server = serve(files)
    server.faults += ["good", "closes early", 503]
    assert list(open_folders([server.address]).rows) == list(open_folders([str(demo_shards / "train")]).rows)
    assert [path for path, _ in server.seen] == ["/index.json", *["/clips.parquet"] * 3]
    server.files["/clips.parquet"] = files["/clips.parquet"][:-9]
    with pytest.raises(AvtrainError, match="clips.parquet: is not the manifest .*at two tries"):
        open_folders([server.address])
    del server.files["/clips.parquet"]
    with pytest.raises(AvtrainError, match="clips.parquet: the server answers 404"):
        open_folders([server.address])


def test_a_run_outlives_a_bad_hour_and_says_what_ends_it(remote, tmp_path, monkeypatch):
    server, address = remote
    command = ["pretrain", "--shards", address, "--preset", "sound", "--max-steps", 1, "--device", "cpu", "--set",
               "data.workers=1", "--set", "training.batch_size=4", "--set", "model.dimension=32"]
    server.faults += [503, "good", "reset", "closes early", "other"]
    done = invoke(*command, "--out", tmp_path / "good")
    assert done.exit_code == 0, done.output
    del server.files["/demo/train-000005.tar"]
    monkeypatch.setenv("AVTRAIN_CACHE", str(tmp_path / "another"))
    done = invoke(*command, "--out", tmp_path / "bad", "--set", "training.batch_size=10")
    assert done.exit_code == 1 and "train-000005.tar?...: the server answers 404" in done.output, done.output
    left = [(path.name, path.stat().st_size) for path in (tmp_path / "another").glob("*.part")]
    assert "Traceback" not in done.output and left == []


def test_several_processes_fetch_a_file_once(server, tmp_path):
    server.faults += ["stalls"]  # long enough for all of them to come
    processes = [multiprocessing.get_context("fork").Process(target=_fetched, args=(server,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(server.seen) == 2 and _cached(tmp_path) == [f"{SHA256}.tar"]


def test_one_that_waits_goes_on_where_another_gave_up(server, tmp_path):
    server.faults += ["closes early", 404]
    processes = [multiprocessing.get_context("fork").Process(target=_fetched, args=(server,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(process.exitcode for process in processes) == [0, 1] and _cached(tmp_path) == [f"{SHA256}.tar"]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_ended_leaves_nothing_wrong(server, tmp_path, monkeypatch, end):
    """Killed: what it had is gone on with. Told to end, as workers are at the end of a run: nothing is left."""
    monkeypatch.setattr(module, "STALL_S", 5)

    def work():
        begin(0)
        _fetched(server)

    server.faults += ["stalls"]
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    part = tmp_path / "cache" / f"{SHA256}.part"
    deadline = time.monotonic() + 10
    while not (part.is_file() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, end)
    process.join()
    assert part.exists() == (end == signal.SIGKILL)
    assert _fetched(server).read_bytes() == CONTENT and _cached(tmp_path) == [f"{SHA256}.tar"]
    assert (server.seen[1][1] > 0) == (end == signal.SIGKILL)


def test_a_cache_that_cant_be_written_and_a_checksum_that_is_none(server, tmp_path, monkeypatch):
    for sha256 in ("../../x", "", "0" * 63):
        with pytest.raises(AvtrainError, match="the checksum in its index is none"):
            kept(f"{server.address}/a/s.tar", 5, sha256)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AVTRAIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(AvtrainError, match="file: Not a directory: make room there, or set AVTRAIN_CACHE"):
        _fetched(server)


def test_told_to_end_while_another_process_has_the_lock(server, tmp_path):
    lock = tmp_path / "cache" / "locks" / f"{SHA256}.lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        process = multiprocessing.get_context("fork").Process(target=lambda: (begin(0), _fetched(server)))
        process.start()
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGTERM)
        process.join()
    assert process.exitcode == 1 and _cached(tmp_path) == [] and server.seen == []
    assert _fetched(server).read_bytes() == CONTENT
