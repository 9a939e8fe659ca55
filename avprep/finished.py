"""Whether a build has nothing to do, told in seconds for a million files.

The raw folder is as it was when the build was planned, and what the build wrote is as it was when it ended.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from avprep.account import SplitReport
from avprep.datasets.files import is_passed_over
from avprep.shards import write_whole

_NOTE = "finished.json"


def digest_of(raw: Path) -> str:
    """Of the names, sizes, dates and rights of all that a listing may look at below a folder."""
    digest = hashlib.sha256()
    parents = frozenset((status.st_dev, status.st_ino) for status in map(os.stat, raw.resolve().parents))
    todo = [(str(raw), parents)]
    while todo:
        here, above = todo.pop()
        lines = [here[len(str(raw)):]]
        try:
            status = os.stat(here)
            identity = status.st_dev, status.st_ino
            if identity not in above:  # a link may lead back, or out to where the raw folder lies
                with os.scandir(here) as entries:
                    for entry in entries:
                        if is_passed_over(entry.name):
                            continue
                        try:
                            status = entry.stat()
                            lines.append(f"{entry.name}/{status.st_size}/{status.st_mtime_ns}/{status.st_mode}")
                            if entry.is_dir():
                                todo.append((entry.path, above | {identity}))
                        except OSError as error:
                            lines.append(f"{entry.name}/{error.errno}")
        except OSError as error:
            lines.append(f"{error.errno}")
        digest.update("\n".join(lines).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def note_finished(folder: Path, settings: dict[str, Any], raw: str, report: SplitReport) -> None:
    """Write down how a build ended.

    Args:
        folder: of the split.
        settings: all that decides what is built, beside the raw folder.
        raw: its digest, taken before it was listed.
        report: what was said of the build.
    """
    said = {name: value for name, value in vars(report).items() if name != "folder"}
    note = {"settings": settings, "raw": raw, "files": _files(folder), "report": said}
    write_whole(folder / ".build" / _NOTE, json.dumps(note).encode())


def if_finished(folder: Path, settings: dict[str, Any], raw: str) -> SplitReport | None:
    """What was said of the build, if it was of the same settings and nothing has changed since."""
    try:
        note = json.loads((folder / ".build" / _NOTE).read_text(encoding="utf-8"))
        if (note["settings"], note["raw"], note["files"]) != (settings, raw, _files(folder)):
            return None
        said = note["report"]
        return SplitReport(folder, **said | {"skipped": Counter(said["skipped"]), "failed": Counter(said["failed"]),
                                             "new_clips_s": 0.0})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files(folder: Path) -> dict[str, list[int]]:
    """Size and date of all that lies in the folder, by name."""
    with os.scandir(folder) as entries:
        found = {entry.name: entry.stat() for entry in entries if entry.name != ".build"}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}
