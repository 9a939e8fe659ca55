"""Programs that read strangers' files: with limits, and gone when avprep is, however it ends. Linux; elsewhere as they
are.

Run as a script, this sets the limits of its own process and becomes the program. So no code runs between fork and exec,
where other threads of avprep may hold locks.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Sequence

NOT_STARTED = 125  # the exit code, where there is no such program
_SET_DEATH_SIGNAL, _NO_NEW_PRIVILEGES = 1, 38  # of prctl
_MAPPED_BYTES = 1 << 31  # of libraries and files, beside what a program asks for
_ENDLESS = 1 << 40


def confined(command: Sequence[bytes], memory_bytes: float, cpu_s: float, file_bytes: float) -> list[bytes]:
    """The command, for a process that is to be started by the thread that will wait for it: the system ends it when
    that thread ends.

    Args:
        command: the program and its arguments.
        memory_bytes: it may ask for; libraries come on top.
        cpu_s: seconds of computing.
        file_bytes: of each file that it writes.
    """
    if sys.platform != "linux":
        return list(command)
    words = [sys.executable, "-I", "-S", __file__, os.getpid(),
             *(int(min(limit, _ENDLESS)) for limit in (memory_bytes, cpu_s, file_bytes))]
    return [*(os.fsencode(str(word)) for word in words), *command]


def limit_memory(memory_bytes: int) -> None:
    """Of this process, from now on; libraries come on top. And what it held when it crashed is not written down."""
    _lower(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":
        _lower(resource.RLIMIT_DATA, memory_bytes)
        _lower(resource.RLIMIT_AS, memory_bytes + _MAPPED_BYTES)


def limit_further_cpu(seconds: int) -> None:
    """Of this process, beside what it has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(used.ru_utime + used.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _lower(kind: int, limit: int, last: int = 0) -> None:
    """`last`: how far beyond the limit it is killed, where it is warned at the limit by a signal."""
    _, hard = resource.getrlimit(kind)
    soft, end = (number if hard == resource.RLIM_INFINITY else min(number, hard) for number in (limit, limit + last))
    resource.setrlimit(kind, (soft, end))


def _become(parent: str, memory_bytes: str, cpu_s: str, file_bytes: str, *command: str) -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if os.getppid() != int(parent):  # it ended before the signal was set
        return
    limit_memory(int(memory_bytes))
    _lower(resource.RLIMIT_CPU, int(cpu_s), last=1)
    _lower(resource.RLIMIT_FSIZE, int(file_bytes))
    for number in (signal.SIGXFSZ, signal.SIGPIPE):  # which Python ignores, and what it becomes would, too
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execv(command[0], command)
    except OSError as error:
        os.write(2, f"{error.strerror}\n".encode())
        os._exit(NOT_STARTED)


if __name__ == "__main__":
    _become(*sys.argv[1:])
