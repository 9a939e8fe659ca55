"""The cache of shards from stores: bounded, and shared by all processes of a machine, which fetch each shard once.

A shard lies there under its checksum. Those that were used longest ago go when there is no room for the next one; a
process that has one of them open can still read it.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from avtrain.data.storage import Damaged, Passing, blocks, patiently, shown
from avtrain.errors import AvtrainError

FOLDER, LIMIT = "AVTRAIN_CACHE", "AVTRAIN_CACHE_GB"  # in the environment, where workers find them too
_FREE_SHARE = 0.1  # of the disk, that is left where no limit is given
_POLL_S = 0.1  # while another process has the file
_ATTEMPTS = 20  # to open what others remove again


def opened(address: str, size: int, sha256: str) -> BinaryIO:
    """A shard, open for reading; fetched if it is not there.

    Args:
        address: where it is.
        size: bytes that it must have.
        sha256: its checksum, by which it is named in the cache.

    Raises:
        AvtrainError: it can't be had, or is not what its index says; or the cache can't be written, or is too small.
    """
    for _ in range(_ATTEMPTS):
        path = kept(address, size, sha256)
        with suppress(FileNotFoundError):  # it had to go again, for what others need
            file = path.open("rb")
            with suppress(PermissionError):  # another user's
                os.utime(file.fileno())  # by which the cache knows what was used last
            return file
    raise AvtrainError(f"{folder()}: {shown(address)} is removed for other shards before it can be read: allow the "
                       "cache more with --cache-gb")


def kept(address: str, size: int, sha256: str) -> Path:
    """Where a shard lies in the cache; fetched if it is not there. Arguments and errors are those of `opened`."""
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise AvtrainError(f"{shown(address)}: the checksum in its index is none; build the split again")
    cache = folder()
    path = cache / f"{sha256}.tar"
    try:
        _lock_of(path).parent.mkdir(parents=True, exist_ok=True)
        if not _is_whole(path, size):
            with FileLock(_lock_of(path), poll_interval=_POLL_S):
                if not _is_whole(path, size):  # another process may have fetched it while this one waited
                    _make_room(cache, path, size)
                    with _unfinished(path.with_suffix(".part")) as part:
                        patiently(address, lambda: _complete(part, address, size, sha256))
                        part.flush()
                        os.fsync(part.fileno())
                        os.replace(part.name, path)
            _make_room(cache, path, 0)  # others may have fetched at the same time
    except OSError as error:
        raise AvtrainError(f"{cache}: {error.strerror or error}: make room there, or set AVTRAIN_CACHE to another "
                           "folder") from error
    return path


def folder() -> Path:
    """AVTRAIN_CACHE, or one in the system's temporary folder."""
    return Path(os.environ.get(FOLDER) or Path(tempfile.gettempdir()) / "avtrain-cache")


def limit_bytes() -> float:
    """What AVTRAIN_CACHE_GB (--cache-gb) allows; infinity where it says nothing.

    Raises:
        AvtrainError: it is no number.
    """
    text = os.environ.get(LIMIT) or "inf"
    try:
        limit = 1e9 * float(text)
    except ValueError:
        limit = math.nan
    if not limit > 0:
        raise AvtrainError(f"{LIMIT} is {text}: a number of gigabytes is wanted")
    return limit


def check_limit(sizes: Sequence[int], at_once: int) -> None:
    """Refuse a limit below the shards that are read in turn: each would be fetched again and again.

    Args:
        sizes: bytes of the shards that come from stores.
        at_once: how many of them clips are shuffled among.

    Raises:
        AvtrainError: says what is wanted.
    """
    needed = sum(sorted(sizes)[-at_once:])
    if needed > limit_bytes():
        raise AvtrainError(f"--cache-gb {limit_bytes() / 1e9:g}: clips are shuffled among {at_once} shards, which have "
                           f"{needed / 1e9:.2g} GB: allow twice that, or lower data.shards_at_once")


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _lock_of(path: Path) -> Path:
    """The lock of a shard's file, whole or not. It stays there, empty."""
    return path.parent / "locks" / f"{path.stem}.lock"


def _make_room(cache: Path, path: Path, wanted: int) -> None:
    """Remove what was used longest ago, until there is room for so many bytes; never `path` itself.

    Raises:
        AvtrainError: the limit is below them.
    """
    limit = limit_bytes()
    if wanted > limit:
        raise AvtrainError(f"{cache}: a shard has {wanted / 1e9:.3f} GB, and --cache-gb allows {limit / 1e9:g}")
    with FileLock(_lock_of(cache / "room"), poll_interval=_POLL_S):
        found = sorted(_used(cache))
        held = sum(size for _, size, _ in found)
        disk = shutil.disk_usage(cache)
        # Without a limit: as much as leaves a share of the disk free.
        over = held + wanted - (limit if limit < math.inf else held + disk.free - _FREE_SHARE * disk.total)
        for _, size, other in found:
            if over <= 0:
                return
            if other.stem != path.stem and _removed(other):
                over -= size


def _used(cache: Path) -> Iterator[tuple[int, int, Path]]:
    """(when it was used, bytes, where it is) of each shard, whole or not."""
    for path in (*cache.glob("*.tar"), *cache.glob("*.part")):
        with suppress(FileNotFoundError):
            status = path.stat()
            yield status.st_mtime_ns, status.st_size, path


def _removed(path: Path) -> bool:
    """Remove a shard; not one that is just being fetched."""
    try:
        with FileLock(_lock_of(path), timeout=0):
            path.unlink(missing_ok=True)
            return True
    except Timeout:
        return False


@contextmanager
def _unfinished(path: Path) -> Iterator[BinaryIO]:
    """The file, gone afterwards. A process that was killed left it: what it had is gone on with."""
    try:
        with path.open("a+b") as file:
            yield file
    finally:
        path.unlink(missing_ok=True)


def _complete(part: BinaryIO, address: str, size: int, sha256: str) -> None:
    """Fetch what the file still lacks, and check it; what is wrong is thrown away."""
    have = part.seek(0, os.SEEK_END)
    try:
        if have < size:
            for block in blocks(address, have, size, from_start=lambda: part.truncate(0)):
                part.write(block)
                if part.tell() > size:
                    break
        have = part.tell()
        if have < size:
            raise Passing(f"ended after {have} of {size} bytes")
        if have > size:
            raise Damaged(f"is longer than the {size} bytes that its index says")
        if _sha256(part) != sha256:
            raise Damaged("its checksum is not the one in its index")
    except Damaged:
        part.truncate(0)
        raise


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
