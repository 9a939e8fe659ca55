"""Folders of shards as `avprep` wrote them: index and manifest, and random access to the clips (shards/README.md)."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from avtrain.data import cache
from avtrain.data.manifest import MANIFEST, TAR_BLOCK, ClipRows, Member, check, joined_rows, parsed, rows_of
from avtrain.data.order import ClipPlace
from avtrain.data.storage import beside, fetch, fetch_json, index_address, is_remote, local_path, shown
from avtrain.errors import AvtrainError

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT, FORMAT_VERSION = "avprep-shards", 2
_MOST_BYTES = 1 << 50  # of a shard
_AGAIN = "build the split again with `avprep build`"
# No path, no address, nothing that a store takes for more than a name.
_FILE_NAME = re.compile(r"(?!\.)[^/\\:?#%*\x00-\x1f]{1,255}")


@dataclass(frozen=True)
class Shard:
    """One tar: where it is (a path, or an address in a store), how many clips it has, and its checksum."""

    url: str
    clips: int
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """Where it is, for messages."""
        return shown(self.url)


@dataclass(frozen=True)
class ShardFolder:
    """One or several indexes of the same spec, as one list of shards; without classes where labels are not used."""

    shards: tuple[Shard, ...]
    rows: ClipRows
    """What the manifests say of every clip, in the order of the shards."""
    spec: dict[str, Any]
    classes: tuple[str, ...]
    multi_label: bool
    fingerprint: str
    """A hash over the shards' checksums: names the data in reports."""
    locations: tuple[str, ...]
    """The folders or addresses that it was opened from."""
    joined_from: tuple[ShardFolder, ...] = ()
    """Those of one location each; none where it is of one itself."""

    @property
    def clips(self) -> int:
        """All clips."""
        return len(self.rows)

    @property
    def clips_of_shards(self) -> list[int]:
        """How many clips each shard has."""
        return [shard.clips for shard in self.shards]


def open_folders(locations: list[str], labelled: bool = True) -> ShardFolder:
    """Read the indexes and manifests of folders of shards.

    Args:
        locations: folders with an `index.json`, or addresses of such folders or of the index itself.
        labelled: as for `joined`.

    Raises:
        AvtrainError: a folder without an index, or of an unknown format; a manifest is missing or does not go with its
            index; or as `joined`.
    """
    return joined([open_folder(location) for location in locations], labelled)


def open_folder(location: str) -> ShardFolder:
    """Read the index and the manifest of one folder of shards, of which there may be none.

    Raises:
        AvtrainError: as `open_folders`.
    """
    address, index = _read_index(location)
    shards = _shards(address, index)
    rows = rows_of(_read_manifest(address, index, shards), [shard.clips for shard in shards])
    return ShardFolder(tuple(shards), rows, index["spec"], tuple(index["classes"]), index["multi_label"],
                       _fingerprint(shards), (location,))


def joined(folders: Sequence[ShardFolder], labelled: bool = True) -> ShardFolder:
    """Folders of one location each, as one list of shards.

    Args:
        folders: in their order.
        labelled: whether labels will be used. If not, datasets of different classes go together, and no classes are
            known.

    Raises:
        AvtrainError: they are not of the same spec and classes as the first, one is there twice, or there are no clips.
    """
    named = ", ".join(shown(folder.locations[0]) for folder in folders)
    shards = [shard for folder in folders for shard in folder.shards]
    if not shards:
        raise AvtrainError(f"no clips in {named or 'an empty list of folders'}")
    first, seen = folders[0], set[str]()
    for folder in folders:
        for what in ("spec", "classes") if labelled else ("spec",):
            one, other = getattr(folder, what), getattr(first, what)
            if one != other:
                raise AvtrainError(f"{shown(folder.locations[0])}: its {what} differ from that of "
                                   f"{shown(first.locations[0])}: {_difference(one, other)}")
        of_folder = {shard.sha256 for shard in folder.shards}  # by what is in them: one place can have several names
        if of_folder & seen:
            raise AvtrainError(f"the same shards twice in {named}: name each folder once")
        seen |= of_folder
    classes = first.classes if labelled else ()
    if len(folders) == 1:
        return replace(first, classes=classes)
    return ShardFolder(tuple(shards), joined_rows([folder.rows for folder in folders]), first.spec, classes,
                       first.multi_label, _fingerprint(shards), tuple(folder.locations[0] for folder in folders),
                       tuple(folders))


def _fingerprint(shards: Sequence[Shard]) -> str:
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()[:16]


def _read_manifest(address: str, index: dict[str, Any], shards: list[Shard]) -> pa.Table:
    """The manifest that lies beside the index, checked."""
    location, clips = _beside(address, MANIFEST), sum(shard.clips for shard in shards)
    complaint = "is not the manifest that goes with its index"
    if is_remote(location):
        table = fetch(location, lambda content: parsed(content, clips), complaint)
    else:
        try:
            table = parsed(location, clips)
        except FileNotFoundError as error:
            raise AvtrainError(f"no {location}, which says where the clips of {address} lie: {_AGAIN}") from error
        except (ValueError, OSError) as error:
            raise AvtrainError(f"{location} {complaint} ({error}): {_AGAIN}") from error
    listed = [(str(entry["url"]), shard.clips, shard.size)
              for entry, shard in zip(index["shardlist"], shards, strict=True)]
    check(shown(location), table, listed, len(index["classes"]))
    return table


def _shards(address: str, index: dict[str, Any]) -> list[Shard]:
    try:
        shards = [Shard(_beside(address, str(entry["url"])), int(entry["nsamples"]), int(entry["filesize"]),
                        str(entry["sha256"])) for entry in index["shardlist"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise AvtrainError(f"{shown(address)} is damaged: an entry of its shardlist can't be read: {error!r}; build "
                           "the split again with `avprep build`") from error
    for shard in shards:  # a clip takes two blocks at least: for its json, and the header before that
        if not 0 <= 2 * TAR_BLOCK * shard.clips <= shard.size < _MOST_BYTES:
            raise AvtrainError(f"{shown(address)} is damaged: a shard of {shard.clips} clips in {shard.size} bytes: "
                               f"{_AGAIN}")
    return shards


def _beside(address: str, name: str) -> str:
    """The address of a shard, which lies beside its index."""
    if not _FILE_NAME.fullmatch(name):
        raise AvtrainError(f"{shown(address)}: the shard {name!r} does not lie beside its index")
    return beside(address, name) if is_remote(address) else str(Path(address).parent / name)


def _read_index(location: str) -> tuple[str, dict[str, Any]]:
    if is_remote(location):
        address = index_address(location)
        index = fetch_json(address)
    else:
        path = Path(local_path(location))
        path = path if path.suffix == ".json" else path / "index.json"
        address = str(path)
        if not path.is_file():
            raise AvtrainError(f"no {path}: name folders that `avprep build` has finished, such as shards/demo/train")
        try:
            index = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise AvtrainError(f"{address} is not a readable index: {error}") from error
    where = shown(address)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise AvtrainError(f"{where} is not an index of avprep shards")
    wanted = {"format_version": int, "spec": dict, "classes": list, "multi_label": bool, "shardlist": list}
    lacking = [name for name, kind in wanted.items() if not isinstance(index.get(name), kind)]
    lacking += [f"spec.{name}" for name in ("segment_frames", "mel_bands", "mel_frames", "reference_step")
                if "spec" not in lacking and (type(value := index["spec"].get(name, 1)) is not int or value < 1)]
    if lacking:
        raise AvtrainError(f"{where} is damaged: no {', '.join(lacking)}; build the split again with `avprep build`")
    if index["format_version"] != FORMAT_VERSION:
        raise AvtrainError(f"{where} has format version {index['format_version']}, this avtrain reads "
                           f"{FORMAT_VERSION}: {_way_out(address, index)}")
    return address, index


def _way_out(address: str, index: dict[str, Any]) -> str:
    """What to do about another version of the format."""
    if index["format_version"] > FORMAT_VERSION:
        return "use the avtrain that goes with the avprep that wrote it"
    split = Path(address).parent
    named = split.parts[-2:] == (index.get("dataset"), index.get("split")) and not is_remote(address)
    out = f" --out {split.parent.parent}" if named else ""
    command = f"avprep build --dataset {index.get('dataset')} --split {index.get('split')}{out}"
    return f"build the split again, with the options of the first time: `{command}`"


def _difference(one: Any, other: Any) -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        return ", ".join(f"{name} {value} and {other.get(name)}" for name, value in one.items()
                         if value != other.get(name))
    return f"{len(one)} and {len(other)} entries" if len(one) != len(other) else "other names or another order"


class ShardReader:
    """Reads clips by their place. Remembers which shards are there, and as large as their index says."""

    def __init__(self, folder: ShardFolder) -> None:
        self._folder = folder
        self._path = lru_cache(maxsize=None)(self._find)

    def read(self, shard: int, position: int, modality: str = "both") -> tuple[str, dict[str, bytes]]:
        """The key of a clip, and its pictures and its sound by ending, as far as they are there and wanted.

        Args:
            modality: visual, audio or both.

        Raises:
            AvtrainError: the shard is missing, or is not what index and manifest say.
        """
        where, place = self._folder.shards[shard].name, ClipPlace(shard, position)
        key = self._folder.rows.at(place).key
        unwanted = {"visual": "logmel.npy", "audio": "mp4"}.get(modality)
        try:
            with self._opened(shard) as file:
                return key, {ending: _content(file.fileno(), where, f"{key}.{ending}", member)
                             for ending, member in self._folder.rows.members(place).items() if ending != unwanted}
        except OSError as error:
            raise AvtrainError(f"{where} can't be read any more: {error.strerror or error}; was it moved or "
                               "deleted?") from error

    def _opened(self, number: int) -> BinaryIO:
        """The shard, open; fetched if it is not on this machine."""
        shard = self._folder.shards[number]
        if is_remote(shard.url):
            return cache.opened(shard.url, shard.size, shard.sha256)
        return self._path(number).open("rb")

    def _find(self, number: int) -> Path:
        """A shard of this machine."""
        shard = self._folder.shards[number]
        path = Path(shard.url)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise AvtrainError(f"{path} can't be read: {error.strerror or error}; was it moved or deleted?") from error
        if size != shard.size:
            raise AvtrainError(f"{path} has {size} bytes, its index says {shard.size}: run `avprep verify`, or "
                               f"{_AGAIN}")
        return path


def _content(file: int, where: str, name: str, member: Member) -> bytes:
    """A member's content, if the header before it has its name and size."""
    both = os.pread(file, TAR_BLOCK + member.size, member.offset - TAR_BLOCK)
    try:
        header = tarfile.TarInfo.frombuf(both[:TAR_BLOCK], "utf-8", "surrogateescape")
        fits = (header.name, header.size, len(both)) == (name, member.size, TAR_BLOCK + member.size)
    except tarfile.HeaderError:
        fits = False
    if not fits:
        raise AvtrainError(f"{where} does not go with its {MANIFEST}: {name} does not lie at byte {member.offset} with "
                           f"{member.size} bytes: run `avprep verify`, or {_AGAIN}")
    return both[TAR_BLOCK:]
