"""Folders of shards as `avprep` wrote them: their index, checked, and random access to the clips (shards/README.md)."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from avtrain.data.download import beside, download, fetch_json, index_address, is_remote, shown
from avtrain.errors import AvtrainError

FORMAT, FORMAT_VERSION = "avprep-shards", 1
_REMEMBERED_SHARDS = 64


@dataclass(frozen=True)
class Shard:
    """One tar: where it is (a path or an http(s) address), how many clips it has, and its checksum."""

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
    spec: dict[str, Any]
    classes: tuple[str, ...]
    multi_label: bool
    fingerprint: str
    """A hash over the shards' checksums: names the data in reports."""
    locations: tuple[str, ...]
    """The folders or addresses that it was opened from."""

    @property
    def clips(self) -> int:
        """All clips."""
        return sum(shard.clips for shard in self.shards)


def open_folders(locations: list[str], labelled: bool = True) -> ShardFolder:
    """Read the indexes of folders of shards.

    Args:
        locations: folders with an `index.json`, or http(s) addresses of such folders or of the index itself.
        labelled: whether labels will be used. If not, datasets of different classes go together, and no classes are
            known.

    Raises:
        AvtrainError: a folder without an index, of an unknown format, named twice, or not of the same spec and classes
            as the first.
    """
    first: dict[str, Any] | None = None
    shards: list[Shard] = []
    for location in locations:
        address, index = _read_index(location)
        first = first or index
        for what in ("spec", "classes") if labelled else ("spec",):
            if index[what] != first[what]:
                raise AvtrainError(f"{shown(address)}: its {what} differ from that of {shown(locations[0])}: "
                                   f"{_difference(index[what], first[what])}")
        shards += _shards(address, index)
    named = ", ".join(map(shown, locations))
    if first is None or not shards:
        raise AvtrainError(f"no clips in {named or 'an empty list of folders'}")
    if len({shard.url for shard in shards}) < len(shards):
        raise AvtrainError(f"the same shards twice in {named}: name each folder once")
    fingerprint = hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()[:16]
    classes = tuple(first["classes"]) if labelled else ()
    return ShardFolder(tuple(shards), first["spec"], classes, first["multi_label"], fingerprint, tuple(locations))


def _shards(address: str, index: dict[str, Any]) -> list[Shard]:
    try:
        return [Shard(_beside(address, str(entry["url"])), int(entry["nsamples"]), int(entry["filesize"]),
                      str(entry["sha256"])) for entry in index["shardlist"]]
    except (KeyError, TypeError, ValueError) as error:
        raise AvtrainError(f"{shown(address)} is damaged: an entry of its shardlist can't be read: {error!r}; build "
                           "the split again with `avprep build`") from error


def _beside(address: str, name: str) -> str:
    """The address of a shard, which lies beside its index."""
    if "/" in name or name.startswith("."):
        raise AvtrainError(f"{shown(address)}: the shard {name!r} does not lie beside its index")
    return beside(address, name) if is_remote(address) else str(Path(address).parent / name)


def _read_index(location: str) -> tuple[str, dict[str, Any]]:
    if is_remote(location):
        address = index_address(location)
        index = fetch_json(address)
    else:
        path = Path(location) if location.endswith(".json") else Path(location) / "index.json"
        address = str(path)
        if not path.is_file():
            raise AvtrainError(f"no {path}: name folders that `avprep build` has finished, such as shards/demo/train")
        try:
            index = json.loads(path.read_bytes())
        except ValueError as error:
            raise AvtrainError(f"{address} is not a readable index: {error}") from error
    where = shown(address)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise AvtrainError(f"{where} is not an index of avprep shards")
    wanted = {"format_version": int, "spec": dict, "classes": list, "multi_label": bool, "shardlist": list}
    lacking = [name for name, kind in wanted.items() if not isinstance(index.get(name), kind)]
    if lacking:
        raise AvtrainError(f"{where} is damaged: no {', '.join(lacking)}; build the split again with `avprep build`")
    if index["format_version"] != FORMAT_VERSION:
        raise AvtrainError(f"{where} has format version {index['format_version']}, this avtrain reads "
                           f"{FORMAT_VERSION}: use the avtrain that goes with the avprep that wrote it")
    return address, index


def _difference(one: Any, other: Any) -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        return ", ".join(f"{name} {value} and {other.get(name)}" for name, value in one.items()
                         if value != other.get(name))
    return f"{len(one)} and {len(other)} entries" if len(one) != len(other) else "other names or another order"


@dataclass(frozen=True)
class Member:
    """Where a file lies in a tar."""

    offset: int
    size: int


class ShardReader:
    """Reads clips by (shard number, position in the shard). Remembers where they lie in the shards used last."""

    def __init__(self, folder: ShardFolder) -> None:
        self._folder = folder
        self._contents = lru_cache(maxsize=_REMEMBERED_SHARDS)(self._list_shard)

    def read(self, shard: int, position: int, modality: str = "both") -> tuple[str, dict[str, bytes]]:
        """The key of a clip and the bytes of its members by ending, without pictures or sound that are not wanted.

        Args:
            modality: visual, audio or both.

        Raises:
            AvtrainError: the shard is missing, or is not what its index says.
        """
        path, clips = self._contents(shard)
        key, members = clips[position]
        unwanted = {"visual": "logmel.npy", "audio": "mp4"}.get(modality)
        try:
            with path.open("rb") as file:
                return key, {ending: os.pread(file.fileno(), member.size, member.offset)
                             for ending, member in members.items() if ending != unwanted}
        except OSError as error:
            raise _unreadable(path, error) from error

    def read_info(self, shard: int, position: int) -> tuple[str, dict[str, Any]]:
        """The key of a clip and the content of its `.json`, without its pictures and sound.

        Raises:
            AvtrainError: as `read`; or the clip has no such member.
        """
        path, clips = self._contents(shard)
        key, members = clips[position]
        try:
            with path.open("rb") as file:
                info = json.loads(os.pread(file.fileno(), members["json"].size, members["json"].offset))
            return key, dict(info)
        except OSError as error:
            raise _unreadable(path, error) from error
        except (KeyError, ValueError, TypeError) as error:
            raise AvtrainError(f"{path}: {key} has no readable .json: run `avprep verify`") from error

    def _list_shard(self, number: int) -> tuple[Path, list[tuple[str, dict[str, Member]]]]:
        shard = self._folder.shards[number]
        path = download(shard.url, shard.size, shard.sha256) if is_remote(shard.url) else Path(shard.url)
        try:
            with tarfile.open(path, "r:") as tar:
                members = [(tarinfo.name, Member(tarinfo.offset_data, tarinfo.size)) for tarinfo in tar]
        except (OSError, tarfile.TarError) as error:
            raise AvtrainError(f"{path} can't be read as a tar: {error}") from error
        clips: list[tuple[str, dict[str, Member]]] = []
        for name, member in members:
            key, _, ending = name.partition(".")
            if not clips or clips[-1][0] != key:
                clips.append((key, {}))
            clips[-1][1][ending] = member
        if len(clips) != shard.clips:
            raise AvtrainError(f"{path} has {len(clips)} clips, its index says {shard.clips}: run `avprep verify`")
        return path, clips


def _unreadable(path: Path, error: OSError) -> AvtrainError:
    return AvtrainError(f"{path} can't be read any more: {error.strerror or error}; was it moved or deleted?")
