"""Parts of a build: each leaves a record beside its shards; `merge` makes one folder of them, as an undivided build."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from avprep import state
from avprep.account import ShardDone, SplitReport, settle
from avprep.datasets.source import Listing, Skipped
from avprep.errors import AvprepError
from avprep.lease import leased
from avprep.making import Job
from avprep.mirror import build_mirror, named
from avprep.plan import ShardTask, plan_digest
from avprep.shards import INDEX, bring_whole, write_whole
from avprep.spec import ClipSpec
from avprep.state import WHOLE, Part
from avprep.storage import Store

_RECORDS = "part-*-of-*.json"


@dataclass(frozen=True)
class PartRecord:
    """What a finished part says of itself.

    Attributes:
        folder: of its shards, OUT/DATASET/SPLIT.
        part: which it is.
        shards: how many all parts have together.
        settings: all that must be the same in all parts, by name.
        plan: a digest of what shares a shard.
        made: the fingerprints of its own shards.
        listing: of the dataset, without its sources.
    """

    folder: Path
    part: Part
    shards: int
    settings: dict[str, Any]
    plan: str
    made: list[str]
    listing: Listing

    def __str__(self) -> str:
        return f"part {self.part} in {self.folder}"


def note_part(job: Job, part: Part, settings: dict[str, Any], listing: Listing, tasks: list[ShardTask]) -> None:
    """Write the record of a part, after its last shard. `settings`: all that decides what is built."""
    record = {"part": [part.number, part.of], "shards": len(tasks), "plan": plan_digest(tasks),
              "made": [tasks[number].fingerprint for number in part.within(len(tasks))],
              "settings": settings,
              "classes": listing.classes, "multi_label": listing.multi_label,
              "skipped": [[entry.name, entry.reason, entry.detail] for entry in listing.skipped]}
    write_whole(_path(job.folder, part), json.dumps(record).encode())


def _path(folder: Path, part: Part) -> Path:
    return folder / ".build" / f"part-{part.number:03d}-of-{part.of:03d}.json"


def forget_parts(folder: Path, part: Part | None = None) -> None:
    """Remove the record of a part, or of all: it is not finished, or the build is one of the whole."""
    for path in [_path(folder, part)] if part else (folder / ".build").glob(_RECORDS):
        path.unlink(missing_ok=True)


def find_parts(outs: Iterable[Path]) -> list[list[PartRecord]]:
    """The finished parts below these folders, those of each split of each dataset together, in order.

    Raises:
        AvprepError: there is none, or a record can't be read.
    """
    found: dict[tuple[str, str], list[PartRecord]] = {}
    for out in outs:
        paths = sorted(out.absolute().glob(f"*/*/.build/{_RECORDS}"))
        if not paths:
            raise AvprepError(f"no finished part of a build in {out}: `avprep build --part 1/16 --out {out}` makes one")
        for path in paths:
            record = _read(path)
            found.setdefault((path.parts[-4], path.parts[-3]), []).append(record)
    return [sorted(records, key=lambda record: (record.part.of, record.part.number)) for records in found.values()]


def _read(path: Path) -> PartRecord:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        listing = Listing(content["classes"], [], [Skipped(*entry) for entry in content["skipped"]],
                          content["multi_label"])
        return PartRecord(path.parent.parent, Part(*content["part"]), content["shards"], content["settings"],
                          content["plan"], content["made"], listing)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AvprepError(f"{path} can't be read: build the part again") from error


def merge(records: list[PartRecord], out: Path) -> SplitReport:
    """Bring all parts of a split into `OUT/DATASET/SPLIT/` and write its index and tables.

    Args:
        records: of the parts, in order.
        out: one of the folders that hold parts; shards of the others are linked or copied into it.

    Raises:
        AvprepError: a part is missing or there twice, some differ in their settings or their lists, or a shard is
            missing. The message names them.
    """
    _check(records)
    first = records[0]
    settings = first.settings
    folder = out.absolute() / settings["dataset"] / settings["split"]
    spec = ClipSpec(**{name: settings[name] for name in asdict(ClipSpec())})
    with state.only_builder(folder, WHOLE):
        job = Job(folder, folder, settings["dataset"], settings["split"], spec, 0.0)
        state.remove_left_over(job, WHOLE, first.shards)
        done = {number: shard for record in records for number, shard in _bring(record, job)}
        state.remove_stale(job, done, WHOLE, first.shards)
        report = settle(folder, job.dataset, job.split, spec, first.listing, [done[number] for number in sorted(done)],
                        (settings["avprep"], settings["ffmpeg"]))
    report.folder = out / job.dataset / job.split
    return report


def merged_in_store(store: Store) -> Iterator[tuple[list[PartRecord], SplitReport]]:
    """`find_parts` and `merge` for the parts in a folder of a store.

    Raises:
        AvprepError: as these do, or another build is writing there.
    """
    with build_mirror(store, lambda: None) as all_parts:
        with named(all_parts.folder, store):
            found = find_parts([all_parts.folder])
        for records in found:
            place = records[0].folder.relative_to(all_parts.folder.absolute())
            there = store.below(*place.parts)
            with leased(there, WHOLE) as lease, named(all_parts.folder, store):
                report = merge(records, all_parts.folder)
                lease.check()
                all_parts.push()
            report.folder = there.address
            yield records, report


def _check(records: list[PartRecord]) -> None:
    """
    Raises:
        AvprepError: they are not the parts of one build.
    """
    first = records[0]
    for one in records[1:]:
        different = [f"{name} {one.settings.get(name)} against {value}" for name, value in first.settings.items()
                     if one.settings.get(name) != value]
        if different:
            raise AvprepError(f"{one} was built with other settings than {first}: {', '.join(different)}")
        if one.part.of != first.part.of:
            raise AvprepError(f"{one} and {first} are of two builds: delete {_path(one.folder, one.part)} or "
                              f"{_path(first.folder, first.part)}, whichever is not meant")
        if (one.plan, one.shards, one.listing) != (first.plan, first.shards, first.listing):
            raise AvprepError(f"{one} was built from another list of files than {first}: build both from the same")
    of = first.part.of
    there: dict[int, PartRecord] = {}
    for one in records:
        if there.setdefault(one.part.number, one) is not one:
            raise AvprepError(f"part {one.part} is there twice, in {there[one.part.number].folder} and in {one.folder}")
    missing = [str(Part(number, of)) for number in range(1, of + 1) if number not in there]
    if missing:
        raise AvprepError(f"of {first.folder}: no part {', '.join(missing)}; build what is missing: avprep build "
                          f"--part {missing[0]}, with the options of the others")


def _bring(record: PartRecord, job: Job) -> list[tuple[int, ShardDone]]:
    """The shards of a part, brought into the folder of the job.

    Raises:
        AvprepError: one is missing.
    """
    brought = []
    there = Job(record.folder, record.folder, job.dataset, job.split, job.spec, 0.0)
    for number, fingerprint in zip(record.part.within(record.shards), record.made, strict=True):
        done = state.if_done(there, number, fingerprint)
        if done is None:
            raise AvprepError(f"{record} lacks {job.shard(number)}: build the part again")
        if record.folder != job.folder:
            (job.folder / INDEX).unlink(missing_ok=True)
            if done.shard:
                bring_whole(record.folder / done.shard["url"], job.folder / done.shard["url"], done.shard["sha256"])
            write_whole(state.marker(job, number), state.marker(there, number).read_bytes())
        brought.append((number, done))
    return brought
