"""The files below a raw folder: which folders are walked, what is named like media, what may stand for one id."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from avprep.datasets.source import CIRCLE, EMPTY_FOLDER, UNREADABLE_FOLDER, Skipped, name_of

# What systems leave behind in folders: nobody's data. Compared in lower case, as are all endings.
_SYSTEM_FOLDERS = frozenset({"__macosx", "@eadir", "lost+found", "$recycle.bin", "#recycle",
                             "system volume information"})

# Endings that libav has a reader for and that are no video or sound: text and subtitles, playlists, pictures, and
# bare numbers without a header, of which it could only guess what they mean.
_NO_MEDIA = frozenset(
    "ans aqt art asc ass cgi chk dat diz ffmeta ice idx ism js jss lrc mcc mks mpd mpl2 nfo pjs rt sami scc smi srt "
    "ssa stl sub sup ttml txt v vt vtt webvtt xml m3u8 sbg "
    "avif bmp dpx exr fits heic heif hdr ico im1 im24 im8 j2c j2k jls jp2 jpeg jpg jxl jxs ljpg mpo pam pbm pcx pfm "
    "pgm pgmyuv phm pix png ppm psp qoi ras rs sgi sun sunras svs tga tif tiff vbn wbmp webp xbm xface xwd "
    "al bin bit bitpacked c2 cdata cif hex idf pcm qcif raw rgb sb sw ub ul uw v210 y yuv yuv10".split())
# Endings of media that libav reads by content and does not name.
_MORE_MEDIA = frozenset(
    "3gpp dif divx evo m1a m1v m2p m2v m4r mod mp1 mpe mpga mpv mts oga ogm ogv ogx opus qt rmvb rv snd spx tod tp "
    "trp vob vro wave weba xvid".split())
# What yt-dlp leaves of the parts that it joined into one file: ID.f137.mp4, ID.temp.mp4.
_PART = re.compile(r"\.(f\d+|fhls|fdash|temp)(-\w+)*$")


@lru_cache(maxsize=1)
def media_endings() -> frozenset[str]:
    """Endings of video and sound files, without the dot: those that libav names, less what is no media."""
    import av  # only the names of its formats; files are opened in media.py

    named = {ending for name in av.formats_available for ending in av.ContainerFormat(name).extensions}
    return frozenset(named - _NO_MEDIA | _MORE_MEDIA)


def is_media(path: Path) -> bool:
    """Whether the file's name ends like that of a video or a sound file."""
    stem, _, ending = path.name.rpartition(".")
    return stem != "" and ending.lower() in media_endings()


def is_passed_over(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or a system's own."""
    return name.startswith(".") or name.casefold() in _SYSTEM_FOLDERS


def all_files(folder: Path, raw: Path, problems: list[Skipped]) -> Iterator[Path]:
    """`all_places`, as paths."""
    return (raw / place for place in all_places(folder, raw, problems))


def all_places(folder: Path, raw: Path, problems: list[Skipped]) -> Iterator[str]:
    """All files below `folder` in sorted order, those of a folder before those of its sub-folders: their paths below
    the raw folder, as text, for there may be millions.

    Links are followed, except back to a folder that they lie in. What is hidden, or a system's own, is passed over.

    Args:
        folder: where to look: the raw folder, or one in it.
        raw: the raw folder; names in `problems` are relative to it, and links to a folder that it lies in are refused.
        problems: gets a line for each folder that can't be walked.
    """
    lexical = folder.parents[: len(folder.relative_to(raw).parts)]  # those from the raw folder down
    todo = [(folder, frozenset(map(_identity, (*raw.resolve().parents, *lexical))))]
    while todo:
        here, above = todo.pop()
        files: list[str] = []
        folders: list[str] = []
        try:
            identity = _identity(here)
            with os.scandir(here) as found:
                for entry in found:
                    if not is_passed_over(entry.name):
                        (folders if _is_folder(entry) else files).append(entry.name)
        except OSError as error:
            problems.append(Skipped(name_of(here, raw), UNREADABLE_FOLDER, error.strerror or ""))
            continue
        if identity in above:
            problems.append(Skipped(name_of(here, raw), CIRCLE))
            continue
        if not files and not folders and is_media(here):
            problems.append(Skipped(name_of(here, raw), EMPTY_FOLDER))
        place = "" if here == raw else f"{here.relative_to(raw).as_posix()}/"
        files.sort(reverse=True)
        while files:  # each goes as it is handed on
            yield place + files.pop()
        folders.sort(reverse=True)
        todo += [(here / name, above | {identity}) for name in folders]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that lead round in a circle
        return False


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def sub_folders(folder: Path) -> list[Path]:
    """The folders in a folder, in sorted order, less those that `all_files` passes over."""
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if not is_passed_over(entry.name) and _is_folder(entry))


class FilesByStem:
    """Media files by their names without ending; whole files before the parts a download tool left of them."""

    def __init__(self, places: Iterable[str]) -> None:
        # Of each: what stands before the name, and what behind it. There may be millions, and nearly all have the same.
        self._found: dict[str, tuple[tuple[str, str], ...]] = {}
        same: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {}
        parts: dict[str, list[tuple[str, str]]] = {}
        endings = media_endings()
        for place in places:
            folder, slash, name = place.rpartition("/")
            stem, dot, ending = name.rpartition(".")
            if not stem or ending.lower() not in endings:
                continue
            whole = _PART.sub("", stem) if "." in stem else stem
            around = folder + slash, name[len(whole):] if whole != stem else dot + ending
            if whole != stem:
                parts.setdefault(whole, []).append(around)
            elif stem in self._found:
                self._found[stem] = (*self._found[stem], around)
            else:
                self._found[stem] = same.setdefault(around, (around,))
        for stem, left in parts.items():
            self._found[stem] = (*self._found.get(stem, ()), *left)

    def around(self, stem: str) -> tuple[tuple[str, str], ...]:
        """What stands before the name and what behind it in the place of each file of this name."""
        return self._found.get(stem, ())

    def __getitem__(self, stem: str) -> tuple[str, ...]:
        """The places of the files of this name; none, if there is none."""
        return tuple([f"{before}{stem}{behind}" for before, behind in self._found.get(stem, ())])

    def items(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """All names, and their files."""
        return ((stem, self[stem]) for stem in self._found)


def first_existing(candidates: Iterable[Path]) -> Path | None:
    """The first of these paths that is there."""
    return next((path for path in candidates if path.exists()), None)
