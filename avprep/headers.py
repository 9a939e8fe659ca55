"""Headers of strangers' files, read by libav in processes that may die: a file that kills its reader fails, alone.

A reader takes paths as lines of JSON and answers each with a line: never with a pickle, as the file may have got hold
of it.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from avprep.confined import limit_further_cpu, limit_memory
from avprep.datasets.source import printable
from avprep.errors import AvprepError, Reason, SourceFailed
from avprep.probe import Media, probe

# Reading a header takes milliseconds; a file that states no length is read to its end.
_TIMEOUT_S = 600.0
_MEMORY_BYTES, _CPU_S = 1_250_000_000, 600  # of a reader, and for each file
_START_TIMEOUT_S, _END_TIMEOUT_S = 120.0, 2.0
# The same modules as here, whatever the current folder holds.
_COMMAND = (sys.executable, "-c", "import sys; sys.path = sys.argv[1:]; from avprep.headers import serve; serve()")


def read_header(path: Path) -> Media | SourceFailed:
    """What `probe` says of a file, after a look at whether it is one; a failure is a result."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for whoever writes to it
            return SourceFailed("probe", Reason.NOT_A_FILE)
        with path.open("rb"):
            pass
        return probe(path)
    except OSError as error:
        link = f", a link to {printable(os.readlink(path))}" if path.is_symlink() else ""
        return SourceFailed("probe", Reason.UNOPENED, f"{error.strerror or error}{link}")
    except MemoryError:
        return SourceFailed("probe", Reason.TOO_LARGE, f"to read it takes more than {_MEMORY_BYTES / 1e9:g} GB")
    except SourceFailed as failure:
        return failure


def serve() -> None:
    """Be a reader: answer the paths on standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer
    limit_memory(_MEMORY_BYTES)
    threading.Thread(target=_end_with_avprep, daemon=True).start()
    _answer(answers, [])
    for line in sys.stdin:
        limit_further_cpu(_CPU_S)
        result = read_header(Path(json.loads(line)))
        _answer(answers, vars(result) if isinstance(result, Media) else
                [result.stage, result.reason.value, result.detail])


def _end_with_avprep() -> None:
    """Wait until nobody can ask any more, whatever file is being read then."""
    poller = select.poll()
    poller.register(0, 0)  # of its end alone
    poller.poll()
    os._exit(0)


def _answer(answers: Any, content: Any) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


class HeaderReader:
    """One process that reads headers. It starts when it is first needed, and anew after it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def read(self, path: Path) -> Media | SourceFailed:
        """What `read_header` says, or that the reader died of the file or was not done in time.

        Raises:
            AvprepError: no reader can be started.
        """
        try:
            answer = _ask(self._running(), json.dumps(str(path)), _TIMEOUT_S)
        except TimeoutError:
            self.close()
            return SourceFailed("probe", Reason.TIMEOUT, f"after {_TIMEOUT_S:g} s")
        if isinstance(answer, dict):
            return Media(**answer)
        if isinstance(answer, list):
            return SourceFailed(answer[0], Reason(answer[1]), answer[2])
        code = self.close()
        if code == -signal.SIGXCPU:
            return SourceFailed("probe", Reason.TIMEOUT, f"after {_CPU_S} s of computing")
        return SourceFailed("probe", Reason.CRASHED, "reading its header, "
                            + (f"by signal {-code}" if code < 0 else f"with code {code}"))

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        # A session of its own: Ctrl-C on the terminal reaches avprep alone.
        self._process = subprocess.Popen([*_COMMAND, *sys.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         bufsize=0, start_new_session=True)
        try:
            ready = _ask(self._process, None, _START_TIMEOUT_S) is not None
        except TimeoutError:
            ready = False
        if not ready:
            raise AvprepError(f"the process that reads headers does not start (code {self.close()})")
        return self._process

    def close(self) -> int:
        """End the process; its exit code."""
        if self._process is None:
            return 0
        with self._process as process:  # closes its pipes, and waits
            self._process = None
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        return process.returncode


def _ask(process: subprocess.Popen[bytes], text: str | None, timeout_s: float) -> Any:
    """Send a line, if there is one, and wait for the answer; None if the process ended instead.

    Raises:
        TimeoutError: there was no answer in time.
    """
    assert process.stdin is not None and process.stdout is not None
    if text is not None:
        try:
            process.stdin.write(text.encode() + b"\n")
        except BrokenPipeError:
            return None
    poller = select.poll()
    poller.register(process.stdout, select.POLLIN)
    answer = b""
    while not answer.endswith(b"\n"):
        if not poller.poll(1000 * timeout_s):
            raise TimeoutError
        part = os.read(process.stdout.fileno(), 1 << 16)
        if not part:
            return None
        answer += part
    return json.loads(answer)


class HeaderReaders:
    """A few readers for a few threads. A context manager: leaving it ends their processes."""

    def __init__(self, count: int) -> None:
        self._readers = [HeaderReader() for _ in range(count)]
        self._idle: queue.SimpleQueue[HeaderReader] = queue.SimpleQueue()
        for reader in self._readers:
            self._idle.put(reader)

    def read(self, path: Path) -> Media | SourceFailed:
        """Have the next idle reader read a header."""
        reader = self._idle.get()
        try:
            return reader.read(path)
        finally:
            self._idle.put(reader)

    def __enter__(self) -> HeaderReaders:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for reader in self._readers:
            reader.close()
