"""Files in stores (https://, s3://, gs://, hf://, memory:// ...), through fsspec: fetched with patience, and never
taken for whole when they are not.

A store's errors become ours here: what may pass is tried again, what will not is said at once.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import fsspec
from tenacity import RetryCallState, Retrying, retry_if_exception_type

from avtrain.errors import AvtrainError, in_a_line

OPTIONS = "AVTRAIN_STORAGE_OPTIONS"  # JSON; in the environment, where workers find it too
TRIES = 5
FIRST_WAIT_S = 1.0     # before the second try; doubled before each further one
LONGEST_WAIT_S = 60.0  # that a server's Retry-After is given
STALL_S = 60.0         # without an answer, or with hardly a byte, until a connection is given up
_LEAST_BYTES_PER_S = 100
_BLOCK_BYTES = 1 << 18        # of a stream
_RANGE_BYTES = 1 << 25        # of a request, where there is one for each range
_PASSING_STATUSES = {408, 425, 429, 500, 502, 503, 504}
_NO_SUCH_RANGE = 416
_MOST_BYTES = 1 << 31  # of an index or a manifest
_IS_IT_THERE = "is the address right, and the upload finished?"
_ADVICE = {401: "it wants credentials", 403: "is the token in the address right, and not expired?", 404: _IS_IT_THERE}
_IS_IT_RIGHT = "is the address right?"
_CREDENTIALS = "are the credentials of the store set, and --storage-options right?"
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "DefaultCredentialsError"}
_REMOTE = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]*://")
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


class NotThere(NotFetched):
    """One that the store does not have, or does not let this user see: stores answer alike where they may not tell."""


class Passing(Exception):
    """What may go well at another try; `wait_s` is what the server asks for."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason, wait_s)
        self.reason, self.wait_s = reason, wait_s


class Damaged(Passing):
    """A whole answer with wrong content: worth one more try, not many."""


def is_remote(location: str) -> bool:
    """Whether it is an address in a store, not a path of this machine."""
    return _REMOTE.match(location) is not None


def local_path(location: str) -> str:
    """A path of this machine, also of a file:// address."""
    return location.removeprefix("file://")


def _is_http(address: str) -> bool:
    return address.startswith(("http://", "https://"))


def index_address(location: str) -> str:
    """The address of the index: of a folder, or already of an index. A query of http(s), such as a token, stays."""
    if not _is_http(location):
        return location if location.endswith(".json") else location.rstrip("/") + "/index.json"
    try:
        parts = urlsplit(location)
    except ValueError as error:
        raise AvtrainError(f"{location} is no address: {error}") from error
    path = parts.path if parts.path.endswith(".json") else parts.path.rstrip("/") + "/index.json"
    return urlunsplit(parts._replace(path=path, fragment=""))


def below(location: str, *names: str) -> str:
    """The path or the address of a folder in a folder, with the same query."""
    if not is_remote(location):
        return str(Path(local_path(location), *names))
    if not _is_http(location):
        return "/".join([location.rstrip("/"), *names])
    parts = urlsplit(location)
    return urlunsplit(parts._replace(path="/".join([parts.path.rstrip("/"), *map(quote, names)])))


def has_index(location: str) -> bool:
    """Whether a folder of shards, of this machine or of a store, has its index; an index itself, whether it is there.

    Raises:
        AvtrainError: the store can't be asked.
    """
    address = index_address(location)
    if not is_remote(location):
        return Path(local_path(address)).is_file()
    try:
        patiently(address, lambda: next(blocks(address), b""))
    except NotThere:
        return False
    return True


def splits_in(location: str) -> tuple[str, str | None]:
    """The splits to train on and to hold out, in the folder or at the address of a dataset; a split is the first one.

    Raises:
        AvtrainError: the store can't be asked.
    """
    if has_index(location):
        return location, None
    train, *others = (below(location, split) for split in ("train", "test", "val"))
    return train if has_index(train) else location, next(filter(has_index, others), None)


def beside(address: str, name: str) -> str:
    """The address of a file in the same folder, with the same query."""
    if not _is_http(address):
        return f"{address.rpartition('/')[0]}/{name}"
    parts = urlsplit(address)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{quote(name)}"))


def shown(address: str) -> str:
    """The address for messages: without what may be secret, its query and password."""
    if not is_remote(address):
        return address
    parts = urlsplit(address)
    query = "..." if parts.query and _is_http(address) else parts.query
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))


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
        content = bytearray()
        for block in blocks(address):
            content += block
            if len(content) > _MOST_BYTES:
                raise NotFetched(shown(address), f"has more than {_MOST_BYTES / 2**30:g} GiB", _IS_IT_RIGHT)
        try:
            return parse(bytes(content))
        except (ValueError, RecursionError) as error:
            raise Damaged(f"{complaint} ({error})") from error

    return patiently(address, attempt)


def patiently(address: str, attempt: Callable[[], _Result]) -> _Result:
    """What the attempt gives, at the latest after `TRIES` of them; waits longer and longer in between.

    Raises:
        AvtrainError: none went well, or it made no sense to go on.
    """
    damaged: list[int] = []

    def is_enough(state: RetryCallState) -> bool:
        if state.outcome and isinstance(state.outcome.exception(), Damaged):
            damaged.append(state.attempt_number)
        return len(damaged) == 2 or state.attempt_number >= TRIES

    try:
        return Retrying(retry=retry_if_exception_type(Passing), stop=is_enough, wait=_wait_s, sleep=time.sleep,
                        reraise=True)(attempt)
    except Passing as error:
        if len(damaged) == 2:
            raise NotFetched(shown(address), f"{error.reason}, at two tries",
                             "copy the shards and their index there again") from error
        raise NotFetched(shown(address), f"{error.reason}; given up after {TRIES} tries",
                         "look after the server and the network, then run the command again") from error


def _wait_s(state: RetryCallState) -> float:
    """Twice as long each time, and not all processes at the same moment. The system's randomness: no seeded generator
    is moved, as tenacity's own waits would do."""
    error = state.outcome.exception() if state.outcome else None
    asked_s = error.wait_s if isinstance(error, Passing) else 0.0
    return asked_s + FIRST_WAIT_S * 2.0 ** (state.attempt_number - 1) * random.SystemRandom().uniform(0.5, 1.5)


def blocks(address: str, first: int = 0, size: int | None = None,
           from_start: Callable[[], object] = lambda: None) -> Iterator[bytes]:
    """A file's content, block by block, from byte `first` on; up to `size` where that is known.

    Args:
        address: where it is.
        first: how much of it is not wanted.
        size: bytes that it has.
        from_start: is called before the first block where a server sends all of it instead.

    Raises:
        Passing: it broke off, or is shorter.
        AvtrainError: it can't be had.
    """
    with _translated(address):
        store, path = fsspec.core.url_to_fs(local_path(address), **_options())
        if _is_http(address):
            yield from _streamed(store, path, first, from_start)
        elif size is None:
            yield store.cat_file(path)
        while not _is_http(address) and size is not None and first < size:
            wanted = min(_RANGE_BYTES, size - first)
            block = store.cat_file(path, start=first, end=first + wanted)
            yield block
            if len(block) < wanted:
                raise Damaged(f"is shorter than the {size} bytes that its index says")
            first += wanted


def _options() -> dict[str, Any]:
    """What is handed to fsspec, beside what it finds itself."""
    text = os.environ.get(OPTIONS) or "{}"
    try:
        options = json.loads(text)
    except ValueError as error:
        raise AvtrainError(f"--storage-options: not JSON: {error}") from error
    if not isinstance(options, dict):
        raise AvtrainError('--storage-options: an object is wanted, such as {"anon": true}')
    return options


def _streamed(store: Any, address: str, first: int, from_start: Callable[[], object]) -> Iterator[bytes]:
    """The body of an answer over http(s), as it comes: it can be gone on with where it broke off."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_S, sock_read=STALL_S)
    # "identity": lengths and ranges are those of the file.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={first}-"} if first else {})
    # Of no use here, but without a size it would be asked for, and with block_size the file not be streamed.
    with store.open(address, block_size=0, size=1, timeout=timeout, headers=headers) as file:
        if first and not file.r.headers.get("Content-Range", "").startswith(f"bytes {first}-"):
            from_start()
        since, got = time.monotonic(), 0
        while block := file.read(_BLOCK_BYTES):
            yield block
            got += len(block)
            spent_s = time.monotonic() - since
            if spent_s > STALL_S:
                if got < _LEAST_BYTES_PER_S * spent_s:
                    raise Passing(f"{got} bytes came in {spent_s:.0f} seconds")
                since, got = time.monotonic(), 0


@contextmanager
def _translated(address: str) -> Iterator[None]:
    """What a store raises as one of ours. Each store has errors of its own kinds, so all are meant here."""
    try:
        yield
    except (Passing, AvtrainError):
        raise
    except Exception as error:
        raise _ours(address, error) from error


def _ours(address: str, error: Exception) -> Exception:
    status = HTTPStatus.NOT_FOUND if isinstance(error, FileNotFoundError) and _is_http(address) else getattr(
        error, "status", None)
    if isinstance(status, int):
        return _of_status(address, status, error)
    cause = getattr(error, "os_error", error)  # aiohttp's; its own texts repeat the address
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return NotThere(shown(address), "is not there", _IS_IT_THERE)
    if isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS:
        kind = NotThere if isinstance(error, PermissionError) else NotFetched
        return kind(shown(address), f"the store refuses it: {in_a_line(error)}", _CREDENTIALS)
    if isinstance(error, ImportError):
        return NotFetched(shown(address), in_a_line(error),
                          "for s3:// that is pip install 'avprep-avtrain[s3]'")
    if isinstance(error, TypeError):
        return NotFetched(shown(address), in_a_line(error), "is --storage-options right?")
    if _is_http(address) and isinstance(error, ValueError):
        return AvtrainError(f"{shown(address)} is no address of a file")
    if isinstance(error, ValueError):  # a protocol that fsspec doesn't know
        return NotFetched(shown(address), in_a_line(error), _IS_IT_RIGHT)
    if hasattr(error, "certificate_error") or (
            isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME):
        return NotFetched(shown(address), in_a_line(cause), _IS_IT_RIGHT)
    if isinstance(error, TimeoutError):
        return Passing(f"not a byte came in {STALL_S:.0f} seconds")
    if isinstance(cause, OSError) and cause.errno in (errno.ECONNREFUSED, errno.EHOSTUNREACH):
        return Passing(os.strerror(cause.errno))  # asyncio's text names neither
    return Passing(f"the connection broke: {in_a_line(error)}")


def _of_status(address: str, status: int, error: Exception) -> Exception:
    """What http's status means."""
    if status == _NO_SUCH_RANGE:
        return Damaged("is shorter than its index says")
    reason = next((known.phrase for known in HTTPStatus if known == status), getattr(error, "message", ""))
    answer = f"the server answers {int(status)} {reason}"
    if status in _PASSING_STATUSES:
        return Passing(answer, _retry_after_s((getattr(error, "headers", None) or {}).get("Retry-After")))
    kind = NotThere if status in (HTTPStatus.NOT_FOUND, HTTPStatus.FORBIDDEN) else NotFetched
    return kind(shown(address), answer, _ADVICE.get(status, _IS_IT_RIGHT))


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
