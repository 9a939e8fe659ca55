"""Which of the files of a source is taken: the headers of all are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from avprep.datasets.source import Source
from avprep.errors import SourceFailed
from avprep.probe import Media


@dataclass(frozen=True)
class Probed:
    """What became of the files of a source.

    Attributes:
        source: as the dataset lists it, with its other files.
        number: of the file that is taken, counted from the listed one on.
        found: what each of the files holds, or why it can't be used.
    """

    source: Source
    number: int
    found: tuple[Media | SourceFailed, ...]

    @property
    def taken(self) -> Source:
        """The file that is taken, as a source."""
        return self.source.candidates[self.number]

    @property
    def media(self) -> Media | SourceFailed:
        """What it holds."""
        return self.found[self.number]


def probe_source(source: Source, read: Callable[[Path], Media | SourceFailed]) -> Probed:
    """Read the headers of a source's files, and take the best; the first, where several are equal."""
    found = tuple(read(candidate.path) for candidate in source.candidates)
    worth = [_worth(candidate, media) for candidate, media in zip(source.candidates, found, strict=True)]
    return Probed(source, worth.index(max(worth)), found)


def _worth(source: Source, media: Media | SourceFailed) -> tuple[bool, bool, bool, bool]:
    if isinstance(media, SourceFailed):
        return False, False, False, False
    return True, media.video_index is not None, source.is_replacement, media.audio_index is not None
