"""Several processes that are stopped, killed, begun again, or started in other ways: the run is the same one."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from many_processes import agree, arguments, losses, run, torchrun

pytestmark = pytest.mark.slow
STEPS = ["--set", "training.steps=40", "--set", "training.save_every=10", "--set", "training.evaluate_every=40"]
PATIENCE_S = 60


@pytest.fixture(scope="module")
def undisturbed(all_kinds, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    code, printed = run(all_kinds, out, 2, *STEPS)
    assert code == 0, printed
    return losses(out)


def ranks_of(out):
    """Pids of the processes that train in a folder, torchrun's own apart."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue  # it has ended
        if str(out) in words and "torch.distributed.run" not in words:
            found.append(int(path.parent.name))
    return found


def started(command, out, until_step, **options):
    """A process whose run has come that far."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").is_file() and len((out / "metrics.jsonl").read_text().splitlines()) >= until_step:
            return process
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate()[0])


def ended(process, out, within_s=PATIENCE_S):
    """(exit code, what it printed); nothing is left of it."""
    printed, _ = process.communicate(timeout=within_s)
    deadline = time.monotonic() + 10
    while ranks_of(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ranks_of(out) == []
    return process.returncode, printed


def killed(out, after=0):
    """SIGKILL for one of the two ranks, not a worker of theirs."""
    pids = ranks_of(out)
    ranks = [pid for pid in pids if int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) not in pids]
    assert len(ranks) == 2
    os.kill(ranks[after], signal.SIGKILL)


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_is_killed_hangs_nobody_and_the_run_goes_on(all_kinds, undisturbed, tmp_path, which):
    out = tmp_path / "run"
    process = started([*torchrun(2), *arguments(all_kinds, out, *STEPS)], out, 12)
    killed(out, which)
    code, printed = ended(process, out)
    assert code != 0 and "Signal 9" in printed
    code, printed = run(all_kinds, out, 2, *STEPS)
    assert code == 0, printed
    agree(undisturbed, losses(out), 1e-8)


def test_torchrun_brings_the_run_back_by_itself(all_kinds, undisturbed, tmp_path):
    out = tmp_path / "run"
    launched = torchrun(2, "--standalone", "--max-restarts", "1")
    process = started([*launched, *arguments(all_kinds, out, *STEPS)], out, 14)
    killed(out, 1)
    code, printed = ended(process, out, 180)
    assert code == 0, printed
    agree(undisturbed, losses(out), 1e-8)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_torchrun_saves_at_once_and_leaves_no_process(all_kinds, undisturbed, tmp_path, number):
    out = tmp_path / "run"
    handled = torchrun(2, "--standalone", "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    process = started([*handled, *arguments(all_kinds, out, *STEPS)], out, 13)
    process.send_signal(number)
    code, printed = ended(process, out)
    saved = max(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir())
    assert code != 0 and saved > 10 and saved == losses(out)[-1]["step"], printed
    assert f"stopped by {number.name} at step {saved}: the same command goes on from " in printed
    code, printed = run(all_kinds, out, 2, *STEPS)
    assert code == 0, printed
    agree(undisturbed, losses(out), 1e-8)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 0)])
def test_ranks_started_by_srun_stop_with_their_own_codes(all_kinds, undisturbed, tmp_path, number, expected):
    """As srun sets the environment, by hand; one of them alone is signalled first."""
    out, port = tmp_path / "run", _free_port()
    ranks = []
    for rank in range(2):
        environment = os.environ | {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": str(rank),
                                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, *arguments(all_kinds, out, *STEPS)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                      text=True) if rank == 0 else started(command, out, 13, env=environment))
    ranks[1].send_signal(number)
    ended_with = [process.communicate(timeout=PATIENCE_S) for process in ranks]
    assert [process.returncode for process in ranks] == [expected, expected], ended_with
    code, printed = run(all_kinds, out, 2, *STEPS)
    assert code == 0, printed
    agree(undisturbed, losses(out), 1e-8)


def test_two_machines_meet(all_kinds, undisturbed, tmp_path):
    """Two torchruns, as docs/scaling.md has them, on this one."""
    out, port = tmp_path / "run", _free_port()
    node = torchrun(1, "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}")
    nodes = [subprocess.Popen([*node, *arguments(all_kinds, out, *STEPS)], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=240)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], printed
    agree(undisturbed, losses(out), 1e-8)


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
