"""What a build leaves in `.build/` beside the shards: who is building, which shards are done, and what is left over."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avprep.account import ShardDone
from avprep.errors import AvprepError
from avprep.making import Job
from avprep.plan import ShardTask
from avprep.shards import INDEX, write_whole

# A part's place in the lock's file, as a share of this: two parts whose shards overlap lock the same bytes, whatever
# their numbers are out of, and before anything is planned.
_LOCK_BYTES = 1 << 40
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Part:
    """One of so many ranges of the shards, counted from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def overlaps(self, other: Part) -> bool:
        """Whether they may have shards in common."""
        mine, theirs = self.within(_LOCK_BYTES), other.within(_LOCK_BYTES)
        return mine.start < theirs.stop and theirs.start < mine.stop

    def within(self, count: int) -> range:
        """Its share of so many."""
        return range(count * (self.number - 1) // self.of, count * self.number // self.of)


WHOLE = Part(1, 1)


def read_part(text: str) -> Part:
    """`3/16`.

    Raises:
        AvprepError: it is none.
    """
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise AvprepError(f"--part {text}: it must be a part and how many there are, such as 3/16, from 1/16 to 16/16")
    return Part(int(number), int(of))


@contextmanager
def only_builder(folder: Path, part: Part) -> Iterator[None]:
    """Hold the lock of a part's shards; the system releases it however this process ends.

    Raises:
        AvprepError: another build has it.
    """
    state = folder / ".build"
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("a") as lock:
        mine = part.within(_LOCK_BYTES)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, len(mine), mine.start)
        except OSError as error:
            if error.errno not in _NO_LOCKS:  # some clusters' file systems; docs/scaling.md says so
                shards = "" if part == WHOLE else f" shards of part {part}"
                raise AvprepError(f"another avprep build is writing{shards} to {folder}: wait for it, or stop "
                                  "it") from error
        scratch = scratch_of(folder, part)
        shutil.rmtree(scratch.parent if part == WHOLE else scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield
        shutil.rmtree(scratch)


def scratch_of(folder: Path, part: Part) -> Path:
    """Where the workers of a part put temporary files."""
    return folder / ".build" / "scratch" / f"{part.number}-of-{part.of}"


def marker(job: Job, number: int) -> Path:
    """The file that is written after a shard."""
    return job.folder / ".build" / f"{job.split}-{number:06d}.json"


def note_done(job: Job, task: ShardTask, made: dict[str, Any]) -> None:
    """Write the marker of a shard."""
    write_whole(marker(job, task.number), json.dumps(made).encode())


def if_done(job: Job, number: int, fingerprint: str) -> ShardDone | None:
    """What a shard's marker says, if it is of the task of this fingerprint and the shard is still there."""
    try:
        made: dict[str, Any] = json.loads(marker(job, number).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if made.get("fingerprint") != fingerprint:
        return None
    if not all("names" in source for source in made["sources"]):  # an earlier version's
        return None
    done = ShardDone.from_json(made)
    path = job.folder / done.shard["url"] if done.shard else None
    if done.shard and path and not (path.is_file() and path.stat().st_size == done.shard["filesize"]):
        return None
    return done


def remove_left_over(job: Job, part: Part, shards: int) -> None:
    """Remove what a build that was killed had half written of this part's shards; of the whole, all there is."""
    state = job.folder / ".build"
    planners = state.glob("planner-*") if part == WHOLE else ()
    for path in [*planners, *state.glob("*.part"), *job.folder.glob("*.part")]:
        if part == WHOLE or _number(job, path) in _own(part, shards):
            path.unlink(missing_ok=True)


def remove_stale(job: Job, done: dict[int, ShardDone], part: Part, shards: int) -> None:
    """Remove tars and markers that are not of this build: whoever globs would read them along. And what earlier
    versions left.

    Goes by what is on disk: `--force` deletes the markers first, and a shard all of whose clips fail has no tar now.
    """
    kept = {marker(job, number) for number in done}
    kept |= {job.folder / shard.shard["url"] for shard in done.values() if shard.shard}
    state = job.folder / ".build"
    for path in [*job.folder.glob(f"{job.split}-[0-9]*.tar"), *state.glob(f"{job.split}-[0-9]*.json")]:
        if path not in kept and _number(job, path) in _own(part, shards):
            path.unlink()
    for path in (state / "probes.jsonl", job.folder / "skipped.jsonl", job.folder / "remarks.jsonl"):
        path.unlink(missing_ok=True)


def _own(part: Part, shards: int) -> range:
    """The numbers whose files a part may remove: its own, and the last part's are all that follow."""
    return range(part.within(shards).start, part.within(shards).stop if part.number < part.of else 1 << 62)


def _number(job: Job, path: Path) -> int:
    """Of a shard's file; -1 if it is none."""
    digits = path.name.removeprefix(f"{job.split}-").partition(".")[0]
    return int(digits) if digits.isdecimal() else -1


def forget(job: Job, numbers: Iterable[int]) -> None:
    """Make these shards count as not done."""
    (job.folder / INDEX).unlink(missing_ok=True)  # it would not fit the shards for a while
    for number in numbers:
        marker(job, number).unlink(missing_ok=True)
