"""Folders in stores (s3://, gs://, hf:// ...), through fsspec: listed, read, and written whole or not at all.

A store's errors become ours here. What may pass is tried again, what does not ends the run in a line.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from avprep.errors import AvprepError

TRIES = 5
FIRST_WAIT_S = 1.0  # before the second try; doubled before each further one
_READ_AT_ONCE = 500
_REMOTE = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]*://")
# Where an upload appears whole or not at all. Elsewhere a file gets another name first.
_ATOMIC = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf", "memory", "oss", "oci"}
# What stores say of a file: by which its content is known, else when it was written.
_CONTENT = ("ETag", "etag", "md5Hash", "blob_id", "oid", "content_md5")
_DATES = ("LastModified", "mtime", "last_modified", "updated", "created")
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, NotImplementedError, ImportError, ValueError, TypeError)
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "DefaultCredentialsError"}
_Result = TypeVar("_Result")


def is_remote(location: str) -> bool:
    """Whether it is an address in a store, not a path of this machine."""
    return _REMOTE.match(location) is not None


def local_path(location: str) -> Path:
    """A path of this machine, also of a file:// address."""
    return Path(location.removeprefix("file://"))


class Stored(NamedTuple):
    """What a store says of a file: its size in bytes, and a number that changes with its content or date."""

    size: int
    mark: int


@dataclass(frozen=True)
class Store:
    """A folder in a store. It may travel to other machines.

    Attributes:
        address: such as s3://bucket/shards.
        options: JSON of what is handed to fsspec, beside what it finds itself.
    """

    address: str
    options: str = field(default="{}", repr=False)

    def below(self, *names: str) -> Store:
        """A folder in it."""
        return Store("/".join([self.address.rstrip("/"), *names]), self.options)

    def listed(self) -> dict[str, Stored]:
        """All files in it and below, by their names from here on.

        Raises:
            AvprepError: the store can't be asked.
        """
        def ask() -> dict[str, Stored]:
            store, root = self._opened()
            store.invalidate_cache()
            prefix = root.rstrip("/") + "/"
            return {path.removeprefix(prefix): Stored(int(info["size"] or 0), _mark(info))
                    for path, info in store.find(root, detail=True).items()
                    if path.startswith(prefix) and not path.endswith("/")}

        return self._patiently("", ask)

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """The contents of small files, many at a time.

        Raises:
            AvprepError: one can't be had.
        """
        for first in range(0, len(names), _READ_AT_ONCE):
            some = {self._path(name): name for name in names[first:first + _READ_AT_ONCE]}

            def ask(some: dict[str, str] = some) -> dict[str, bytes]:
                found: dict[str, bytes] = self._opened()[0].cat(list(some))
                return found

            yield from ((some[path], content) for path, content in self._patiently("", ask).items())

    def read_at(self, name: str, offset: int, size: int) -> bytes:
        """So many bytes of a file.

        Raises:
            AvprepError: they can't be had.
        """
        def ask() -> bytes:
            content: bytes = self._opened()[0].cat_file(self._path(name), start=offset, end=offset + size)
            if len(content) != size:
                raise OSError(f"{len(content)} of {size} bytes came")
            return content

        return self._patiently(name, ask)

    def fetch(self, name: str, target: Path) -> None:
        """A file, brought to a place of this machine; nothing is there if it is not in the store, or must not be read.

        Raises:
            AvprepError: it can't be had.
        """
        def ask() -> None:
            store, path = self._opened()[0], self._path(name)
            try:
                size = int(store.info(path)["size"])
                store.get_file(path, str(target))
            except (FileNotFoundError, PermissionError):  # as of a file here: whoever opens it says so
                target.unlink(missing_ok=True)
                return
            if target.stat().st_size != size:
                raise OSError(f"ended after {target.stat().st_size} of {size} bytes")

        target.parent.mkdir(parents=True, exist_ok=True)
        self._patiently(name, ask)

    def put(self, name: str, source: Path) -> None:
        """A file of this machine, whole or not at all.

        Raises:
            AvprepError: it can't be stored.
        """
        def ask() -> None:
            (store, _), path = self._opened(), self._path(name)
            first = path if self.address.partition("://")[0] in _ATOMIC else f"{path}.part"
            store.put_file(str(source), first)
            store.invalidate_cache()
            size = int(store.info(first)["size"])
            if size != source.stat().st_size:
                raise OSError(f"{size} of {source.stat().st_size} bytes arrived")
            if first != path:
                store.mv(first, path)

        self._patiently(name, ask)

    def create(self, name: str, content: bytes) -> bool:
        """A small file that must not be there yet; False if it is. Stores without such a thing go by what they list.

        Raises:
            AvprepError: it can't be stored.
        """
        def ask() -> bool:
            (store, _), path = self._opened(), self._path(name)
            store.invalidate_cache()
            if store.exists(path):
                return False
            try:
                try:
                    store.pipe_file(path, content, mode="create")
                except (NotImplementedError, ValueError, TypeError):
                    store.pipe_file(path, content)
                return True
            except FileExistsError:
                return False

        return self._patiently(name, ask)

    def write(self, name: str, content: bytes) -> None:
        """A small file.

        Raises:
            AvprepError: it can't be stored.
        """
        self._patiently(name, lambda: self._opened()[0].pipe_file(self._path(name), content))

    def remove(self, names: Sequence[str]) -> None:
        """Remove files, which may be gone already.

        Raises:
            AvprepError: the store does not let them go.
        """
        def ask() -> None:
            store = self._opened()[0]
            for name in names:
                try:
                    store.rm_file(self._path(name))
                except FileNotFoundError:
                    pass

        self._patiently("", ask)

    def _opened(self) -> tuple[Any, str]:
        """fsspec's store, which it keeps for each process, and the folder's path there."""
        import fsspec

        store, path = fsspec.core.url_to_fs(self.address, **storage_options(self.options))
        return store, str(path)

    def _path(self, name: str) -> str:
        return f"{self._opened()[1].rstrip('/')}/{name}"

    def _patiently(self, name: str, ask: Callable[[], _Result]) -> _Result:
        """What the store answers, at the latest after `TRIES` times; waits longer and longer in between.

        Raises:
            AvprepError: it does not, or it makes no sense to ask again.
        """
        try:
            return Retrying(retry=retry_if_exception(_is_passing), stop=stop_after_attempt(TRIES), wait=_wait_s,
                            reraise=True)(ask)
        except AvprepError:
            raise
        except Exception as error:  # each store has errors of its own kinds
            said = next(iter(str(error).splitlines()), "") or type(error).__name__
            where = f"{self.address.rstrip('/')}/{name}".rstrip("/")
            raise AvprepError(f"{where}: {said}{_advice(error)}") from error


def _is_passing(error: BaseException) -> bool:
    """Whether it may go well at another try."""
    return isinstance(error, Exception) and not isinstance(error, (AvprepError, *_FINAL)) and (
        type(error).__name__ not in _NO_CREDENTIALS)


def _wait_s(state: RetryCallState) -> float:
    """Twice as long each time, and not all workers at the same moment."""
    return FIRST_WAIT_S * 2.0 ** (state.attempt_number - 1) * random.uniform(0.5, 1.5)


def storage_options(text: str) -> dict[str, Any]:
    """What `--storage-options` says.

    Raises:
        AvprepError: it is no JSON object.
    """
    try:
        options = json.loads(text)
    except ValueError as error:
        raise AvprepError(f"--storage-options: not JSON: {error}") from error
    if not isinstance(options, dict):
        raise AvprepError('--storage-options: an object is wanted, such as {"anon": true}')
    return options


def _advice(error: Exception) -> str:
    if _is_passing(error):
        return (f"; given up after {TRIES} tries: look after the store and the network, then run the command again: it "
                "goes on")
    if isinstance(error, ImportError):
        return ": for s3:// that is pip install 'avprep-avtrain[s3]'"
    if isinstance(error, FileNotFoundError):
        return ": is the address right, and the bucket there?"
    if isinstance(error, TypeError | ValueError):
        return ": are address and --storage-options right?"
    return ": are the credentials of the store set, and --storage-options right?"


def _mark(info: dict[str, Any]) -> int:
    """A number for a file's content, as far as the store tells; else for its date. Below 2^61."""
    said = next((str(info[name]) for name in (*_CONTENT, *_DATES) if info.get(name)), "")
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "big") >> 3
