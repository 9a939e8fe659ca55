"""Clips <-> tar: a shard appears whole or not at all. The format is described in shards/README.md."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

from avprep.clips import Clip
from avprep.errors import AvprepError
from avprep.spec import FORMAT, FORMAT_VERSION

INDEX = "index.json"


class ShardWriter:
    """Writes one tar beside its final name and renames it when it is complete.

    A context manager: left without `finish()`, it removes what it wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = 0
        self._part = path.with_name(path.name + ".part")
        self._file = _HashingFile(self._part)
        self._tar = tarfile.open(fileobj=cast(IO[bytes], self._file), mode="w|", format=tarfile.USTAR_FORMAT)

    def add(self, clip: Clip) -> None:
        """Append the clip's members, `KEY.ENDING`."""
        for ending, content in clip.members.items():
            member = tarfile.TarInfo(f"{clip.key}.{ending}")
            member.size = len(content)  # everything else that a tar records stays 0, the same on any day
            self._tar.addfile(member, io.BytesIO(content))
        self.samples += 1

    def finish(self) -> dict[str, Any]:
        """Bring the shard under its final name.

        Returns:
            Its entry for the index: url (relative to the index), nsamples, filesize in bytes, sha256.
        """
        self._tar.close()
        size, digest = self._file.finish()
        os.replace(self._part, self.path)
        _sync_folder(self.path.parent)
        return {"url": self.path.name, "nsamples": self.samples, "filesize": size, "sha256": digest}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.file.close()
        self._part.unlink(missing_ok=True)


class _HashingFile:
    """A file for tarfile's stream mode that knows the checksum of what went through it."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, block: bytes) -> int:
        self._digest.update(block)
        self._size += len(block)
        return self.file.write(block)

    def finish(self) -> tuple[int, str]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self._size, self._digest.hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_samples(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard in order: (key, bytes of the members by ending).

    Raises:
        AvprepError: the tar is damaged; the message names it.
    """
    try:
        with tarfile.open(shard, "r|") as tar:
            key, members = "", dict[str, bytes]()
            for member in tar:
                file = tar.extractfile(member)
                this_key, _, ending = member.name.partition(".")
                if this_key != key and members:
                    yield key, members
                    members = {}
                key = this_key
                members[ending] = file.read() if file else b""
            if members:
                yield key, members
    except (tarfile.TarError, EOFError, OSError) as error:
        raise AvprepError(f"{shard} can't be read as a tar: {error}") from error


def read_index(path: Path) -> dict[str, Any]:
    """An `index.json`, checked for format and version.

    Raises:
        AvprepError: it is not one of ours, or of a version that this program does not know.
    """
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AvprepError(f"{path} is not a readable index: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise AvprepError(f"{path} is not an index of avprep shards")
    if index["format_version"] != FORMAT_VERSION:
        raise AvprepError(f"{path} has format version {index['format_version']}, this avprep knows {FORMAT_VERSION}: "
                          "build the shards again, or use the avprep that wrote them")
    return index


def find_indexes(folder: Path) -> list[Path]:
    """Every `index.json` at or below a folder of shards.

    Raises:
        AvprepError: there is none.
    """
    if not folder.exists():
        raise AvprepError(f"no folder {folder}: name a folder that `avprep build` wrote, such as shards/demo/train")
    found = [folder] if folder.name == INDEX and folder.is_file() else sorted(folder.rglob(INDEX))
    if not found:
        raise AvprepError(f"no {INDEX} in {folder} or below: `avprep build` writes it last, so an unfinished build "
                          "has none; run the build again to finish it")
    return found
