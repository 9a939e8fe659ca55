"""Files over http(s): fetched with patience, whole or not at all, and once for all processes of a machine."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import re
import signal
import socket
import ssl
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from avtrain.errors import AvtrainError, in_a_line

TRIES = 5
FIRST_WAIT_S = 1.0     # before the second try; doubled before each further one
LONGEST_WAIT_S = 60.0  # that a server's Retry-After is given
STALL_S = 60.0         # without an answer, or with hardly a byte, until a connection is given up
_LEAST_BYTES_PER_S = 100
_POLL_S = 0.1  # while another process has the file
_BLOCK_BYTES = 1 << 18
_PASSING_STATUSES = {408, 425, 429, 500, 502, 503, 504}
_NO_SUCH_RANGE = 416
_ADVICE = {401: "it wants credentials", 403: "is the token in the address right, and not expired?",
           404: "is the address right, and the upload finished?"}
_IS_IT_RIGHT = "is the address right?"
_Result = TypeVar("_Result")


class NotFetched(AvtrainError):
    """A file that can't be had.

    Args:
        address: where it was looked for, as it may be shown.
        reason: why.
        advice: what to do.
    """

    def __init__(self, address: str, reason: str, advice: str) -> None:
        super().__init__(address, reason, advice)
        self.address, self.reason, self.advice = address, reason, advice

    def __str__(self) -> str:
        return f"{self.address}: {self.reason}: {self.advice}"


class _Passing(Exception):
    """What may go well at another try; `wait_s` is what the server asks for."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason, wait_s)
        self.reason, self.wait_s = reason, wait_s


class _Damaged(_Passing):
    """A whole answer with wrong content: worth one more try, not many."""


def is_remote(location: str) -> bool:
    """Whether it is an http(s) address."""
    return location.startswith(("http://", "https://"))


def index_address(location: str) -> str:
    """The address of the index: of a folder, or already of an index. A query, such as a token, stays."""
    try:
        parts = urlsplit(location)
    except ValueError as error:
        raise AvtrainError(f"{location} is no address: {error}") from error
    path = parts.path if parts.path.endswith(".json") else parts.path.rstrip("/") + "/index.json"
    return urlunsplit(parts._replace(path=path, fragment=""))


def beside(address: str, name: str) -> str:
    """The address of a file in the same folder, with the same query."""
    parts = urlsplit(address)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{quote(name)}"))


def shown(address: str) -> str:
    """The address for messages: without what may be secret, its query and password."""
    if not is_remote(address):
        return address
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="..." if parts.query else ""))


def fetch_json(address: str) -> Any:
    """The content of a JSON file, the index.

    Raises:
        AvtrainError: it can't be had, or is no JSON.
    """
    return fetch(address, json.loads, "is not a readable index")


def fetch(address: str, parse: Callable[[bytes], _Result], complaint: str) -> _Result:
    """What `parse` makes of a file that is small enough to be held in memory.

    Args:
        address: where it is.
        parse: raises ValueError where the content is damaged.
        complaint: what is then said of it.

    Raises:
        AvtrainError: it can't be had, or not be parsed.
    """
    def attempt() -> _Result:
        with _opened(address) as response:
            text, lacking = b"".join(_blocks(response)), response.length
        if lacking:
            raise _Passing(f"ended {lacking} bytes too early")
        try:
            return parse(text)
        except ValueError as error:
            raise _Damaged(f"{complaint} ({error})") from error

    return _patiently(address, attempt)


def download(address: str, size: int, sha256: str) -> Path:
    """The file in the cache folder (AVTRAIN_CACHE, or the system's temporary folder), fetched if it is not there.

    Args:
        address: where it is.
        size: bytes that it must have.
        sha256: its checksum, by which it is named in the cache.

    Raises:
        AvtrainError: it can't be had, or is not what its index says; or the cache can't be written.
    """
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise AvtrainError(f"{shown(address)}: the checksum in its index is none; build the split again")
    cache = Path(os.environ.get("AVTRAIN_CACHE") or Path(tempfile.gettempdir()) / "avtrain-cache")
    path = cache / f"{sha256}.tar"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not _is_whole(path, size):
            with _alone(path.with_suffix(".part")) as part:
                if not _is_whole(path, size):  # another process may have fetched it while this one waited
                    _patiently(address, lambda: _complete(part, address, size, sha256))
                    part.flush()
                    os.fsync(part.fileno())
                    os.replace(part.name, path)
    except OSError as error:
        raise AvtrainError(f"{cache}: {error.strerror or error}: make room there, or set AVTRAIN_CACHE to another "
                           "folder") from error
    return path


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


@contextmanager
def _alone(path: Path) -> Iterator[BinaryIO]:
    """The unfinished file, locked against other processes; gone afterwards. One that was killed left it: go on."""
    file: BinaryIO | None = None
    try:
        while file is None:
            with _undisturbed():
                file = _locked(path)
            if file is None:
                time.sleep(_POLL_S)
        yield file
    finally:
        if file is not None:
            path.unlink(missing_ok=True)
            file.close()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Requests to end wait until the block has ended: what it makes is then known, and can be removed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever disturbed
        return
    asked: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: asked.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if asked:
            signal.raise_signal(asked[0])


def _locked(path: Path) -> BinaryIO | None:
    """The file, made if it is not there; None where another process has it, or had it until now."""
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    file.close()
    return None


def _complete(part: BinaryIO, address: str, size: int, sha256: str) -> None:
    """Fetch what the file still lacks, and check it; what is wrong is thrown away."""
    have = part.seek(0, os.SEEK_END)
    try:
        if have < size:
            with _opened(address, have) as response:
                if have and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                    have = part.truncate(0)  # the server sends all of it
                for block in _blocks(response):
                    part.write(block)
                    have += len(block)
                    if have > size:
                        break
        if have < size:
            raise _Passing(f"ended after {have} of {size} bytes")
        if have > size:
            raise _Damaged(f"is longer than the {size} bytes that its index says")
        if _sha256(part) != sha256:
            raise _Damaged("its checksum is not the one in its index")
    except _Damaged:
        part.truncate(0)
        raise


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _patiently(address: str, attempt: Callable[[], _Result]) -> _Result:
    """What the attempt gives, at the latest after `TRIES` of them; waits longer and longer in between.

    Raises:
        AvtrainError: none went well, or it made no sense to go on.
    """
    damaged = 0
    for number in range(1, TRIES + 1):
        try:
            return attempt()
        except _Passing as error:
            damaged += isinstance(error, _Damaged)
            if damaged == 2:
                raise NotFetched(shown(address), f"{error.reason}, at two tries",
                                 "copy the shards and their index there again") from error
            if number == TRIES:
                raise NotFetched(shown(address), f"{error.reason}; given up after {TRIES} tries",
                                 "look after the server and the network, then run the command again") from error
            # Not all at the same moment. The system's randomness: no seeded generator is moved.
            time.sleep(error.wait_s + FIRST_WAIT_S * 2 ** (number - 1) * random.SystemRandom().uniform(0.5, 1.5))
    raise AssertionError("the last try returns or raises")


def _opened(address: str, first: int = 0) -> HTTPResponse:
    """The server's answer, from byte `first` on if it can do that."""
    request = urllib.request.Request(address, headers={"Range": f"bytes={first}-"} if first else {})
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=STALL_S)
        return response
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == _NO_SUCH_RANGE:
            raise _Damaged("is shorter than its index says") from error
        answer = f"the server answers {error.code} {error.reason}"
        if error.code in _PASSING_STATUSES:
            raise _Passing(answer, _retry_after_s(error.headers.get("Retry-After"))) from error
        raise NotFetched(shown(address), answer, _ADVICE.get(error.code, _IS_IT_RIGHT)) from error
    except urllib.error.URLError as error:
        if _is_final(error.reason):
            raise NotFetched(shown(address), str(error.reason), _IS_IT_RIGHT) from error
        raise _Passing(str(error.reason)) from error
    except (ValueError, InvalidURL) as error:
        raise AvtrainError(f"{shown(address)} is no address: {error}") from error
    except (OSError, HTTPException) as error:
        raise _Passing(in_a_line(error)) from error


def _is_final(reason: object) -> bool:
    """Whether another try would find the same: no such host, or one that is not who it says."""
    return (not isinstance(reason, OSError) or isinstance(reason, ssl.SSLCertVerificationError)
            or isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME)


def _retry_after_s(value: str | None) -> float:
    """Seconds that a Retry-After asks for, as a number or as a date, within reason."""
    try:
        if value is None or value.strip().isdecimal():
            asked_s = float(value or 0)
        else:
            asked_s = parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0
    return min(max(asked_s, 0.0), LONGEST_WAIT_S)


def _blocks(response: HTTPResponse) -> Iterator[bytes]:
    """The body, part by part, until the connection ends."""
    since, got = time.monotonic(), 0
    try:
        while block := response.read1(_BLOCK_BYTES):
            yield block
            got += len(block)
            spent_s = time.monotonic() - since
            if spent_s > STALL_S:
                if got < _LEAST_BYTES_PER_S * spent_s:
                    raise _Passing(f"{got} bytes came in {spent_s:.0f} seconds")
                since, got = time.monotonic(), 0
    except (OSError, HTTPException) as error:
        raise _Passing(f"the connection broke: {in_a_line(error)}") from error
