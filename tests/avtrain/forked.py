"""`avtrain` in several processes that are forked from one that has loaded everything: seconds, where torchrun takes
many times that. As a script: reads commands as JSON, and writes what came of them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


def forked(*commands, timeout=600):
    """Run commands one after the other.

    Args:
        commands: (processes, arguments of `avtrain`, code that each process executes before, in which `rank` is known).

    Returns:
        For each command the exit codes of its processes, and what all of them printed.
    """
    asked = json.dumps([[ranks, list(map(str, arguments)), *code] for ranks, arguments, *code in commands])
    done = subprocess.run([sys.executable, __file__], input=asked, capture_output=True, text=True, check=False,
                          timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _one_of(rank, ranks, port, arguments, code, printed):
    """In the forked process: the command; does not come back."""
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)})
    for number in (1, 2):
        os.dup2(printed, number)
    status = 1
    try:
        from avtrain.cli import main

        exec(code, {"rank": rank})
        main(arguments, prog_name="avtrain")
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _run(ranks, arguments, code=""):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryFile() as printed:
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                _one_of(rank, ranks, port, arguments, code, printed.fileno())
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        printed.seek(0)
        return codes, printed.read().decode()


if __name__ == "__main__":
    import avtrain.pretraining.pretrain
    import avtrain.transfer.embeddings
    import avtrain.transfer.evaluate  # noqa: F401

    sys.path.insert(0, str(Path(__file__).parent))
    found = [_run(*command) for command in json.load(sys.stdin)]
    json.dump(found, sys.stdout)
