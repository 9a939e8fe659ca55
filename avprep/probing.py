"""What the listed files hold: read once, remembered, and of several files for one id the best taken."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from avprep.datasets.source import OTHER_FILE, Skipped, Source
from avprep.errors import SourceFailed
from avprep.executors import run_local
from avprep.headers import HeaderReaders
from avprep.probe import Media
from avprep.progress import progress

_BATCH = 1024
# A reader takes about a third of a second to start, and reads a few dozen headers in that time.
_FILES_A_READER = 32


def probe_all(sources: list[Source], cache_path: Path,
              workers: int) -> tuple[list[Source], list[Media | SourceFailed], list[Skipped]]:
    """Read the headers of all sources, their other files included.

    Returns:
        (for each source the file that is taken, what that holds, a line for each other file that nobody takes)
    """
    candidates = {candidate.path: candidate for source in sources for candidate in (source, *source.others)}
    found = _read_all(list(candidates.values()), ProbeCache(cache_path), workers)
    taken = [max((source, *source.others), key=lambda candidate: _worth(candidate, found[candidate.path]))
             for source in sources]
    left: dict[Path, Skipped] = {}
    taken_paths = {source.path for source in taken}
    for source, best in zip(sources, taken, strict=True):
        for other in (source, *source.others):
            if other.path not in taken_paths:
                result = found[other.path]
                why = f"; this one: {result.reason.value}" if isinstance(result, SourceFailed) else ""
                left[other.path] = Skipped(other.name, OTHER_FILE, f"{best.name} was taken{why}")
    return taken, [found[source.path] for source in taken], list(left.values())


def _worth(source: Source, media: Media | SourceFailed) -> tuple[bool, bool, bool, bool]:
    """Of several files for one id the greatest is taken; the first, where several are equal."""
    if isinstance(media, SourceFailed):
        return False, False, False, False
    return True, media.video_index is not None, source.is_replacement, media.audio_index is not None


def _read_all(sources: list[Source], cache: ProbeCache, workers: int) -> dict[Path, Media | SourceFailed]:
    found: dict[Path, Media | SourceFailed] = {}
    for source in sources:
        if (known := cache.get(source)) is not None:
            found[source.path] = known
    unknown = [source for source in sources if source.path not in found]
    workers = min(workers, 1 + len(unknown) // _FILES_A_READER)
    fresh: list[tuple[Source, Media]] = []
    paths = (source.path for source in unknown)
    with HeaderReaders(workers) as readers, closing(run_local(readers.read, paths, workers)) as results:
        try:
            for source, result in zip(unknown, progress(results, "probe", "file", len(unknown)), strict=True):
                found[source.path] = result
                if isinstance(result, Media):
                    fresh.append((source, result))
                if len(fresh) == _BATCH:
                    cache.add(fresh)
                    fresh = []
        finally:
            cache.add(fresh)
    return found


class ProbeCache:
    """What was probed before, so that a build that goes on does not open every file again.

    One line a file is appended as soon as it is known; files whose size or date changed are probed anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, tuple[list[int], Media]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    name, state, media = json.loads(line)
                    if media.keys() == Media.__dataclass_fields__.keys():  # else another version wrote it
                        self._known[name] = (state, Media(**media))
                except (ValueError, TypeError, AttributeError):  # the last line of a killed run
                    continue

    def get(self, source: Source) -> Media | None:
        """The file's media, if it has not changed since."""
        state, media = self._known.get(source.name, (None, None))
        return media if state is not None and state == _state(source) else None

    def add(self, found: Iterable[tuple[Source, Media]]) -> None:
        """Append what was found."""
        with self._path.open("a", encoding="utf-8") as file:
            for source, media in found:
                state = _state(source)
                if state is not None:
                    entry: list[Any] = [source.name, state, vars(media)]
                    file.write("\n" + json.dumps(entry))


def _state(source: Source) -> list[int] | None:
    try:
        status = source.path.stat()
    except OSError:  # it is gone
        return None
    return [status.st_size, status.st_mtime_ns]
