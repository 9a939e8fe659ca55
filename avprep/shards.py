"""Clips <-> tar: a shard appears whole or not at all. The format is described in shards/README.md."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import tarfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from avprep.clips import Clip
from avprep.errors import AvprepError
from avprep.spec import FORMAT, FORMAT_VERSION, SPEC_OPTIONS, ClipSpec

INDEX = "index.json"
_SHOWN = 100
# The file names of shards: no path, no address, nothing that a shell or a terminal takes for something else.
_FILE_NAME = re.compile(r"(?!\.)[^/\\:?#%*\x00-\x1f]{1,255}")
_FIELDS = {"dataset": str, "split": str, "spec": dict, "classes": list, "counts": dict, "shardlist": list,
           "manifest": list}
_COUNTS = {"clips": int, "seconds": float, "bytes": int, "without_sound": int, "without_picture": int,
           "sources_found": int, "sources_written": int, "sources_skipped": dict, "sources_failed": dict, "marks": dict,
           "clips_per_class": list}


class ShardWriter:
    """Writes one tar beside its final name and renames it when it is complete.

    A context manager: left without `finish()`, it removes what it wrote. Two that write the same shard, as a worker
    given up for lost and the one in its place may, don't meet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = 0
        self._part = _part_of(path)
        self._file = _HashingFile(self._part)
        self._tar: Any = None

    def add(self, clip: Clip) -> dict[str, tuple[int, int]]:
        """Append the clip's members, `KEY.ENDING`.

        Returns:
            (offset, size) in the tar of each member's content, by ending.
        """
        if self._tar is None:
            # It brings torch, in seconds; by now the first clips are being made, by other processes.
            from webdataset.writer import TarWriter

            # Everything else that a tar records stays empty, the same on any day.
            self._tar = TarWriter(self._file, encoder=False, mtime=0, user="", group="", mode=0o644)
        at = self._tar.tarstream.offset
        self._tar.write({"__key__": clip.key, **clip.members})
        places = {}
        for ending in sorted(clip.members):  # the order in which it writes them
            size = len(clip.members[ending])
            places[ending] = (at + tarfile.BLOCKSIZE, size)
            at += tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))
        assert at == self._tar.tarstream.offset, "webdataset writes tars in another way than it did"
        self.samples += 1
        return places

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
        if self._tar is not None:  # else the stream of a shard that failed writes its rest to the closed file, some day
            self._tar.tarstream.fileobj.closed = True
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


def _part_of(path: Path) -> Path:
    """Where a file is written first, beside its final place; no two are the same."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")


def bring_whole(source: Path, target: Path, sha256: str) -> None:
    """Put a finished shard under another name: a hard link, or a copy where that can't be.

    Raises:
        AvprepError: what was copied has another checksum.
    """
    if target.exists() and target.samefile(source):
        return
    with _becoming(target, _part_of(target)) as part:
        try:
            part.hardlink_to(source)
        except OSError:  # another file system, or one without links
            copy = _HashingFile(part)
            with source.open("rb") as file:
                while block := file.read(1 << 20):
                    copy.write(block)
            if copy.finish()[1] != sha256:
                raise AvprepError(f"{source} is damaged (checksum): build its part again with --force") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    with _becoming(path, path.with_name(path.name + ".part")) as part, part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _becoming(path: Path, part: Path) -> Iterator[Path]:
    """The part takes the place of the file if the block ends well; else, also where it is interrupted, it vanishes."""
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class Sample:
    """A sample as it stands in a tar: its key; the bytes, and (offset, size) in the tar, of its members by ending."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)


def read_samples(shard: Path) -> Iterator[Sample]:
    """The samples of a shard in order, read from its start to its end.

    Raises:
        AvprepError: the tar is damaged; the message names it.
    """
    try:
        size = shard.stat().st_size
        with tarfile.open(shard, "r|") as tar:
            sample = Sample("")
            for member in tar:
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse or member.pax_headers:
                    raise AvprepError(f"{shard}: its member {member.name[:_SHOWN]!r} is no plain file")
                if member.offset_data + member.size > size:
                    raise AvprepError(f"{shard}: its member {member.name[:_SHOWN]!r} is longer than the shard")
                file = tar.extractfile(member)
                key, _, ending = member.name.partition(".")
                if key != sample.key:
                    if sample.members:
                        yield sample
                    sample = Sample(key)
                sample.members[ending] = file.read() if file else b""
                sample.places[ending] = member.offset_data, member.size
            if sample.members:
                yield sample
    except (tarfile.TarError, EOFError, OSError) as error:
        raise AvprepError(f"{shard} can't be read as a tar: {error}") from error


def read_at(shard: Path, offset: int, size: int) -> bytes:
    """So many bytes of a shard.

    Raises:
        AvprepError: it has not so many there.
    """
    with shard.open("rb") as file:
        if offset < 0 or not 0 <= size <= os.fstat(file.fileno()).st_size - offset:
            raise AvprepError(f"{shard} has no {size} bytes at byte {offset}: run `avprep verify`")
        file.seek(offset)
        return file.read(size)


def read_index(path: Path) -> dict[str, Any]:
    """An `index.json`, checked for format and version.

    Raises:
        AvprepError: it is not one of ours, or of a version that this program does not know.
    """
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AvprepError(f"{path} is not a readable index: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise AvprepError(f"{path} is not an index of avprep shards")
    if index.get("format_version") != FORMAT_VERSION:
        raise AvprepError(f"{path} has format version {index.get('format_version')}, this avprep knows "
                          f"{FORMAT_VERSION}: build the shards again with: {_build_command(path, index)}")
    if wrong := next(_faults(index), None):
        raise AvprepError(f"{path} is damaged: {wrong}: build the split again with `avprep build`")
    return index


def _faults(index: dict[str, Any]) -> Iterator[str]:
    """What is not as it must be in an index, which may be a stranger's: it says which files are read."""
    for kinds, inside, prefix in ((_FIELDS, index, ""), (_COUNTS, index.get("counts"), "counts.")):
        lacking = [f"{prefix}{name}" for name, kind in kinds.items()
                   if not isinstance(inside, dict) or not _is_a(inside.get(name), kind)]
        if lacking:
            yield f"no {', '.join(lacking)}"
    names, specs = (index["classes"], list(asdict(ClipSpec())))
    if not all(isinstance(name, str) for name in names):
        yield "a class is no name"
    if not all(_is_a(index["spec"].get(name), int) for name in specs):
        yield "its spec is none"
    if len(index["counts"]["clips_per_class"]) != len(names):
        yield "it counts other classes than it has"
    for name in ("sources_skipped", "sources_failed", "marks", "clips_per_class"):
        counted = index["counts"][name]
        if not all(_is_a(count, int) for count in (counted.values() if isinstance(counted, dict) else counted)):
            yield f"counts.{name} has no numbers"
    for entry in (*index["shardlist"], *index["manifest"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("url"), str) or not _FILE_NAME.fullmatch(
                entry["url"]):
            yield f"{str(entry.get('url') if isinstance(entry, dict) else entry)[:_SHOWN]!r} is no file beside it"
        elif not (_is_a(entry.get("filesize"), int) and isinstance(entry.get("sha256"), str)):
            yield f"{entry['url']} has no size or checksum"
    if not all(_is_a(entry.get("nsamples"), int) for entry in index["shardlist"]):
        yield "a shard has no number of clips"


def _is_a(value: Any, kind: type) -> bool:
    """Of that type; of a number also: not negative, and a number."""
    if kind in (int, float):
        return type(value) in (int, kind) and 0 <= value < math.inf
    return isinstance(value, kind)


def _build_command(path: Path, index: dict[str, Any]) -> str:
    """The command that made an index, but for where the raw files are."""
    made, usual = index.get("spec", {}), ClipSpec()
    changed = [f"--{name.replace('_', '-')} {made[name]}" for name in SPEC_OPTIONS
               if made.get(name, getattr(usual, name)) != getattr(usual, name)]
    out = shlex.quote(str(path.absolute().parent.parent.parent))
    return " ".join(["avprep build", f"--dataset {index.get('dataset')} --split {index.get('split')}", "--raw RAW",
                     f"--out {out}", *changed])


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
