"""What lies in a store, as a folder of this machine: all names, sizes and marks of files, and the content of the few
that are read. So whoever lists a dataset, or looks after what a build has left, knows nothing of stores.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from avprep.errors import AvprepError
from avprep.manifest import CLIPS, SOURCES
from avprep.shards import INDEX, read_at
from avprep.storage import Store, Stored, is_remote, local_path

_TABLES = (".csv", ".txt")
_TABLES_DEPTH = 2   # annotations lie in the raw folder, or in a folder in it
_LONGEST_NAME = 255
_MOST_SECONDS = 1 << 31  # that every file system can date a file with
_STATE = ".build"
_OURS = ("lock", "scratch", "lease")  # in it: of this machine alone, or of who holds the lease


@contextmanager
def raw_mirror(store: Store) -> Iterator[tuple[Path, list[str]]]:
    """A folder of stand-ins for the files of a store: without content, but for the tables of annotations.

    Yields:
        The folder, and the names that no file of this machine can have.

    Raises:
        AvprepError: there is nothing.
    """
    with _folder("raw") as folder:
        listed = store.listed()
        if not listed:
            raise AvprepError(f"no files at {store.address} (--raw): is the address right?")
        unusable = _stand_ins(folder, listed)
        tables = [name for name in listed if name.lower().endswith(_TABLES) and name.count("/") < _TABLES_DEPTH
                  and name not in unusable]
        for name, content in store.read(tables):
            (folder / name).write_bytes(content)
            _date(folder / name, listed[name])
        for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
            os.utime(path, ns=(0, 0))
        yield folder, sorted(unusable)


@contextmanager
def named(folder: Path, store: Store | None) -> Iterator[None]:
    """What goes wrong in a mirror is said of the store."""
    try:
        yield
    except AvprepError as error:
        if store is None:
            raise
        raise type(error)(str(error).replace(str(folder), store.address.rstrip("/"))) from error


@dataclass(frozen=True)
class Shards:
    """Finished shards in a folder of this machine: where they lie, or one that stands for a folder in a store. There
    indexes and tables are whole, and the tars are without content.

    Attributes:
        folder: that of this machine.
        store: the one that it stands for.
    """

    folder: Path
    store: Store | None = None

    def read_at(self, shard: Path, offset: int, size: int) -> bytes:
        """So many bytes of a shard of the folder."""
        if self.store is None:
            return read_at(shard, offset, size)
        return self.store.read_at(shard.relative_to(self.folder).as_posix(), offset, size)

    @contextmanager
    def whole(self, shard: Path) -> Iterator[None]:
        """A shard of the folder has its content meanwhile."""
        if self.store is None or not shard.is_file():
            yield
            return
        size = shard.stat().st_size
        self.store.fetch(shard.relative_to(self.folder).as_posix(), shard)
        yield
        if shard.is_file():
            os.truncate(shard, 0)
            os.truncate(shard, size)

    def shown(self, text: object) -> str:
        """The text, with the store's address in place of the folder that stands for it."""
        return str(text) if self.store is None else str(text).replace(str(self.folder), self.store.address)


@contextmanager
def shards_at(location: str, options: str) -> Iterator[Shards]:
    """Finished shards: a folder of this machine or its address in a store, or an index there.

    Raises:
        AvprepError: the store has nothing there, or can't be asked.
    """
    if not is_remote(location):
        yield Shards(local_path(location))
        return
    store = Store(location.rstrip("/").removesuffix(f"/{INDEX}"), options)
    with _folder("shards") as folder, named(folder, store):
        listed = {name: stored for name, stored in store.listed().items() if _STATE not in PurePosixPath(name).parts}
        if not listed:
            raise AvprepError(f"no files at {store.address}: is the address right?")
        unusable = _stand_ins(folder, listed)
        small = [name for name in listed if PurePosixPath(name).name in (INDEX, CLIPS, SOURCES)
                 and name not in unusable]
        for name, content in store.read(small):
            (folder / name).write_bytes(content)
        yield Shards(folder, store)


class Mirror:
    """The folder of a build in a store, and a folder of this machine that stands for it; `push` makes the store as that
    is. Shards are stand-ins here, and never go there: their workers bring them to the store themselves.

    Attributes:
        store: the folder in the store.
        folder: that of this machine.
    """

    def __init__(self, store: Store, folder: Path, check: Callable[[], None]) -> None:
        self.store, self.folder, self._check = store, folder, check
        self._known: dict[str, tuple[int, int]] = {}  # size and date here of what is the same there
        self.pull()

    def pull(self, contents: bool = True) -> None:
        """Make the folder as the store is. `contents`: with what the markers of shards and the notes of parts say."""
        listed = {name: stored for name, stored in self.store.listed().items() if not _is_ours(name)}
        for name in self._there():
            (self.folder / name).unlink()
        _stand_ins(self.folder, listed)
        markers = [name for name in listed if name.endswith(".json") and PurePosixPath(name).parent.name == _STATE
                   and contents]
        for name, content in self.store.read(markers):
            (self.folder / name).write_bytes(content)
            _date(self.folder / name, listed[name])
        self._known = self._there()

    def add_shard(self, name: str, size: int) -> None:
        """Stand in for a shard that its worker has brought to the store."""
        with (self.folder / name).open("wb") as file:
            file.truncate(size)
        self._known[name] = _state(self.folder / name)

    def push(self) -> None:
        """Make the store as the folder is, but for shards. An index goes before anything that it describes changes, and
        comes last.

        Raises:
            AvprepError: what `check` raises, or the store.
        """
        self._check()
        there = self._there()
        changed = [name for name, state in there.items()
                   if self._known.get(name) != state and PurePosixPath(name).suffix != ".tar"]
        indexes = [name for name in changed if PurePosixPath(name).name == INDEX]
        gone = [name for name in self._known if name not in there or name in indexes]
        if gone:
            self.store.remove(sorted(gone, key=lambda name: PurePosixPath(name).name != INDEX))
        for name in sorted(changed, key=indexes.__contains__):
            self.store.put(name, self.folder / name)
        self._known = there

    def _there(self) -> dict[str, tuple[int, int]]:
        return {name: _state(path) for path in self.folder.rglob("*")
                if path.is_file() and not _is_ours(name := path.relative_to(self.folder).as_posix())}


@contextmanager
def build_mirror(store: Store, check: Callable[[], None]) -> Iterator[Mirror]:
    """The mirror of a build's folder in a store; the folder of this machine goes at the end. `check` raises where the
    store must not be written to any more."""
    with _folder("out") as folder:
        yield Mirror(store, folder, check)


def _is_ours(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any(one == _STATE and other.startswith(_OURS) for one, other in zip(parts, parts[1:], strict=False))


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _stand_ins(folder: Path, listed: dict[str, Stored]) -> set[str]:
    """Make files of these names, sizes and marks, without content.

    Returns:
        The names that can't be: the file system has no such name, or a folder of it.
    """
    unusable: set[str] = set()
    made: set[Path] = set()
    for name, stored in listed.items():
        if not _is_usable(name):
            unusable.add(name)
            continue
        try:
            parent = (folder / name).parent
            if parent not in made:
                parent.mkdir(parents=True, exist_ok=True)
                made.add(parent)
            with (folder / name).open("wb") as file:
                file.truncate(stored.size)
            _date(folder / name, stored)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):  # a is a file, and a/b another
            unusable.add(name)
    return unusable


def _is_usable(name: str) -> bool:
    """Whether it is a path below a folder."""
    parts = name.split("/")
    return not ({"", ".", ".."} & {*parts}) and "\0" not in name and max(
        len(os.fsencode(part)) for part in parts) <= _LONGEST_NAME


def _date(path: Path, stored: Stored) -> None:
    """Its mark as its date: by that a build knows what has changed."""
    mark = stored.mark % (_MOST_SECONDS * 10**9)
    os.utime(path, ns=(mark, mark))


@contextmanager
def _folder(name: str) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f"avprep-{name}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


