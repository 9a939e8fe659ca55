"""Batches that workers can't hand over: an error in one line and soon, never a hang."""

import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_eval import NETWORK, invoke, settings
from torch.utils.data import DataLoader, Dataset

from avtrain.config import read_config
from avtrain.data import handover
from avtrain.data.clips import ClipDataset
from avtrain.data.loader import Batch, batches
from avtrain.data.order import at_epoch, batches_of, fixed_order
from avtrain.data.shards import open_folders
from avtrain.data.storage import NotFetched
from avtrain.data.views import Views
from avtrain.errors import AvtrainError, TaskFailed, TooManyUnreadable, Unreadable

ROOT = Path(__file__).parents[3]
MIB = 2**20


class _Made(Dataset):
    """Batches of a size; something befalls the worker that makes the third."""

    def __init__(self, size_bytes=1000, befalls=None, timeout_s=60):
        self.size_bytes, self.befalls, self.timeout_s = size_bytes, befalls, timeout_s

    def batch_bytes(self, at):
        return 0

    def ahead(self, items):
        return items

    def name_of(self, one):
        return f"clip {one[0]}"

    def __getitems__(self, at, begins=int):
        begins(0)
        if at[0][0] == 2 and self.befalls is not None:
            self.befalls()
        nothing = torch.empty(0)
        return Batch(torch.zeros(self.size_bytes, dtype=torch.uint8), nothing, nothing, nothing, [[0]], [str(at[0][0])])


def _items(count):
    return [[(number, 0)] for number in range(count)]


def _keys(dataset, count=6, workers=2):
    return [batch.keys[0] for batch in batches(dataset, _items(count), workers)]


def _in_small_memory(size, code):
    """Run Python code where /dev/shm is of that size."""
    def run(*command):
        script = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec \"$@\""
        return subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", *command], capture_output=True, text=True,
                              check=False, timeout=60, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})

    try:
        probe = run("true")
    except FileNotFoundError:
        pytest.skip("no unshare on this system")
    if probe.returncode:
        pytest.skip(f"a small /dev/shm can't be mounted here: {probe.stderr.strip()}")
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    return run(sys.executable, "-c", f"import sys; sys.path[:0] = {folders!r}\n{code}")


def test_nothing_befalls():
    assert _keys(_Made()) == _keys(_Made(), workers=0) == list("012345") and _keys(_Made(), 0) == []


@pytest.mark.seconds
def test_a_full_shared_memory_ends_the_run_with_a_line():
    done = _in_small_memory("8m", """
import test_handover as here
from avtrain.errors import AvtrainError
try:
    for batch in here.batches(here._Made(3_000_000), here._items(50), 2):
        here.time.sleep(0.3)  # a slow step: the workers run ahead
except AvtrainError as error:
    print("said:", error)
""")
    assert "said: a worker can't hand its batch over through /dev/shm: unable to allocate" in done.stdout, done.stderr
    assert "No space left" in done.stdout and "--shm-size" in done.stdout and "data.workers=0" in done.stdout


@pytest.mark.seconds
def test_no_shared_memory_at_all_is_said_at_the_start():
    done = _in_small_memory("4k", """
import test_handover as here
from avtrain.errors import AvtrainError
open("/dev/shm/full", "wb").write(bytes(4096))
try:
    here._keys(here._Made())
except AvtrainError as error:
    print("said:", error)
""")
    assert "said: workers can't be started: No space left on device" in done.stdout, done.stderr
    assert "--shm-size" in done.stdout


@pytest.mark.parametrize("command", ["pretrain", *(pytest.param(name, marks=pytest.mark.slow)
                                                   for name in ("eval", "embed"))])
def test_every_command_looks_for_room_before_it_starts(demo_shards, checkpoint, tmp_path, command):
    options = {
        "pretrain": ["--shards", str(demo_shards), "--preset", "tiny", "--out", str(tmp_path / "run")],
        "eval": ["--task", "demo", "--shards", str(demo_shards.parent), "--init", "random", "--preset", "tiny",
                 "--out", str(tmp_path / "eval")],
        "embed": ["--checkpoint", str(checkpoint), "--shards", str(demo_shards / "test"), "-o",
                  str(tmp_path / "rows.parquet"), "--set", "data.workers=2"]}[command]
    options += [] if command == "pretrain" else ["--cache", str(tmp_path / "cache")]
    done = _in_small_memory("300k", f"from avtrain.cli import main; main({[command, '--device', 'cpu', *options]!r})")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "Error: /dev/shm has 0 MiB free, and the batches that workers make ahead can take" in done.stderr


def _once(path, befall):
    """Only the first time, in whatever process."""
    def befalls():
        if not path.exists():
            path.touch()
            befall()

    return befalls


@pytest.mark.seconds
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("befall", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: time.sleep(600)])
def test_a_worker_that_ends_or_hangs_is_replaced_at_the_same_place(tmp_path, caplog, befall, workers):
    made = _Made(befalls=_once(tmp_path / "befallen", befall), timeout_s=1.5)
    assert _keys(made, 9, workers) == list("012345678")  # none lost, none twice
    [said] = caplog.messages
    assert re.fullmatch("a worker (was killed.*|has made no batch .*); workers are started again at clip 2", said)
    assert not multiprocessing.active_children()


def test_a_lost_worker_is_replaced_where_another_loader_was_used_before(tmp_path):
    """torch's own handler of SIGCHLD stays behind after it, and raises in the middle of anything."""
    handler = signal.getsignal(signal.SIGCHLD)
    assert len(list(DataLoader(_Numbers(), num_workers=1))) == 3
    made = _Made(befalls=_once(tmp_path / "befallen", lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert _keys(made, 9) == list("012345678")
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    signal.signal(signal.SIGCHLD, handler)


class _Numbers(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, number):
        return number


@pytest.mark.seconds
def test_one_that_hangs_for_the_second_time_is_an_error_that_names_the_clip():
    with pytest.raises(handover.LostTwice, match=r"no batch for 2 s .* second time, while it made clip 2"):
        _keys(_Made(befalls=lambda: time.sleep(600), timeout_s=1.5))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("number", "message"), [
    (signal.SIGBUS, "ended by SIGBUS, as when /dev/shm is full: give it more"),
    (signal.SIGKILL, "was killed, as the system does when memory runs out: lower data.workers"),
    (signal.SIGSEGV, "SIGSEGV")])
def test_a_worker_that_is_ended_is_an_error_where_its_batch_is_awaited(number, message):
    before, keys = signal.getsignal(signal.SIGCHLD), []
    started = time.monotonic()
    with pytest.raises(AvtrainError, match=f"{message}.*; it was for the second time, while it made clip 2") as caught:
        for batch in batches(_Made(befalls=lambda: os.kill(os.getpid(), number)), _items(6), 2):
            time.sleep(0.2)  # torch would raise its own error here
            keys += batch.keys
    assert keys in ([], ["0"], ["0", "1"]) and time.monotonic() - started < 15 and "\n" not in str(caught.value)
    assert signal.getsignal(signal.SIGCHLD) == before


def test_what_goes_wrong_in_handing_over_is_said(monkeypatch):
    for error, message in ((RuntimeError("unable to mmap\nin C++"), "unable to mmap; give it more"),
                           (OSError(errno.EMFILE, "Zu viele"), "raise the limit"),
                           (RuntimeError("received 0 items of ancdata"), "raise the limit"),
                           (RuntimeError("unable to open </torch_1>: Too many open files (24)"), "raise the limit")):
        def fails(batch, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(handover, "ForkingPickler", SimpleNamespace(dumps=fails))
            with pytest.raises(handover.NotHandedOver, match=message) as caught:
                _keys(_Made())
        # Nor is a worker left while the error, and with it the loader, is held.
        assert "\n" not in str(caught.value) and not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [
    TaskFailed("AvtrainError: demo", "AvtrainError: a reason\nin two lines"), handover.NotHandedOver("no room", False),
    handover.WorkerEnded(frozenset({-9})), NotFetched("http://h/a", "gone", "look for it"),
    TooManyUnreadable([Unreadable("a.tar", "key", "its video can't be decoded: broken")]),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "a.tar")])
def test_an_error_comes_from_a_worker_as_it_was_raised(error, workers):
    def fails():
        raise error

    with pytest.raises(type(error)) as caught:
        _keys(_Made(befalls=fails), workers=workers)
    assert str(caught.value) == str(error) and caught.value.args == error.args
    assert vars(caught.value) == vars(error) and getattr(caught.value, "filename", "") == getattr(error, "filename", "")


def test_faults_of_our_own_are_not_taken_for_a_lost_worker():
    def fault():
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        _keys(_Made(befalls=fault))


def test_a_shard_that_vanishes_is_said(demo_shards, tmp_path):
    for path in (demo_shards / "train").glob("*.*"):
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    dataset = ClipDataset(open_folders([str(tmp_path)]), read_config("tiny").data, 0)
    dataset[fixed_order([1] * 10)[3], 0]
    (tmp_path / "train-000003.tar").unlink()
    with pytest.raises(AvtrainError, match="train-000003.tar can't be read any more: No such file"):
        list(batches(dataset, at_epoch([fixed_order([1] * 10)[3:4]], 0), 1))


def test_room_is_what_is_in_flight(monkeypatch):
    free = SimpleNamespace(f_bavail=10, f_frsize=MIB)
    monkeypatch.setattr(handover.os, "statvfs", lambda path: free)
    assert handover.in_flight_bytes(MIB, 0) == 0
    handover.check_room(handover.in_flight_bytes(2 * MIB, 2))  # two ahead for each worker, and one in use
    with pytest.raises(AvtrainError, match="has 10 MiB free.* can take 14 MiB"):
        handover.check_room(handover.in_flight_bytes(2 * MIB, 3))

    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(handover.os, "statvfs", missing)
    handover.check_room(10**15)


def test_training_and_its_evaluation_have_room_together(demo_shards, tmp_path, monkeypatch):
    """Each by itself would fit: the second would fail in the middle of the run."""
    def refuse(wanted_bytes):
        raise AvtrainError(f"{wanted_bytes} bytes")

    monkeypatch.setattr("avtrain.pretraining.pretrain.check_room", refuse)
    monkeypatch.setattr("avtrain.transfer.finetune.check_room", refuse)
    done = invoke("pretrain", "--shards", demo_shards, "--preset", "tiny", "--out", tmp_path / "run", "--device", "cpu",
                  "--max-steps", 1, *settings(NETWORK), "--set", "data.workers=1", "--set", "training.batch_size=8")
    of_one = 15 * (3 * 4 * 24**2 + 4 * 80 * 128)
    assert f"Error: {3 * (8 + 2) * of_one} bytes" in done.output  # eight to train on; the two that are held out
    done = invoke("eval", "--task", "demo", "--shards", demo_shards.parent, "--init", "random", "--preset", "tiny",
                  "--protocol", "finetune", "--recipe", "small", "--validation", "0.3", "--out", tmp_path / "eval",
                  "--device", "cpu", *settings([*NETWORK, "data.workers=1", "transfer.epochs=1"]))
    assert re.search(r"Error: \d+ bytes", done.output), done.output


@pytest.mark.parametrize("modality", ["both", "visual", "audio"])
@pytest.mark.parametrize("seed", [None, 0])
def test_a_batch_is_never_larger_than_it_was_said_to_be(demo_shards, modality, seed):
    folder = open_folders([str(demo_shards / "train")])
    data = read_config("tiny", ["data.segment_frames=4", f"data.modality={modality}"]).data
    places = batches_of(fixed_order([1] * 10), 3)[0]
    items = [(place, 0) for place in places]
    for views, at in ((None, items), (Views(modality, 4), [(places[0], 0, 2)]),
                      (Views(modality, 4, random_start=True), items),
                      *((Views(modality, 4, 1 if modality == "audio" else 3, one), items) for one in (True, False))):
        dataset = ClipDataset(folder, data, seed, views)
        [batch] = batches(dataset, [at], 0)
        assert sum(tensor.nbytes for tensor in (batch.visual, batch.audio)) == dataset.batch_bytes(at)


def test_no_process_is_left():
    supply = batches(_Made(), _items(50), 2)
    next(supply)
    supply.close()
    assert not multiprocessing.active_children()


@pytest.mark.seconds
@pytest.mark.parametrize("end", ["the fetcher", pytest.param("the workers", marks=pytest.mark.slow)])
def test_who_is_ended_while_it_begins_ends_and_is_no_copy_of_this_process(tmp_path, end):
    """The handlers of signals that a run has are in place when its processes are forked."""
    code = f"""
import os, signal, sys, time
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
from avtrain.data import ahead
from avtrain.data.shards import Shard
from avtrain.errors import AvtrainError
from avtrain.stopping import Interrupted, Stopping
from avtrain.data.loader import batches
from test_handover import _Made, _items

def ended_at_once(fork=os.fork):
    pid = fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGTERM)  # it is told to end before it could say what that means
    return pid

os.fork = ended_at_once
far = [Shard("http://127.0.0.1:9/none.tar", 1, 10, "0")]
with Stopping(None) as stop:
    for number in range(2):
        try:
            with stop.interruptible():
                if {end == "the fetcher"}:
                    list(ahead.fetched_ahead([], far))
                else:
                    next(batches(_Made(), _items(2), 2))
        except (Interrupted, AvtrainError):  # both workers were lost, twice
            pass
with open({str(tmp_path / "ended")!r}, "a") as file:
    file.write(f"{{os.getpid()}}\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "ended").read_text().splitlines()) == 1
