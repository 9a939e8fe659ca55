"""The account of a split: every source ends as written, skipped or failed, and the index says what there is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from avprep.datasets.source import OTHER_FILE, Listing, Skipped
from avprep.manifest import CLIPS, CLIPS_SCHEMA, SOURCES, SOURCES_SCHEMA, entry_of, parquet_of, table_of
from avprep.shards import INDEX, write_whole
from avprep.spec import FORMAT, FORMAT_VERSION, ClipSpec

FAILURES = "failures.jsonl"


@dataclass
class SplitReport:
    """The account of one split. Sources: found = written + skipped + failed; a source of which some clips could not
    be made counts as failed, its other clips stay. `other_lengths`: written ones that are not as long as they say."""

    folder: Path | str
    found: int = 0
    written: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    other_lengths: int = 0
    clips: int = 0
    clips_s: float = 0.0
    new_clips_s: float = 0.0
    elapsed_s: float = 0.0
    bytes: int = 0
    shards: int = 0


@dataclass(frozen=True)
class ShardDone:
    """What is known of a finished shard: its entry in the index (None: no clip could be made), its clips' rows, and
    what became of each of its sources."""

    shard: dict[str, Any] | None
    clips: pa.Table
    sources: list[dict[str, Any]]

    @classmethod
    def from_json(cls, made: dict[str, Any]) -> ShardDone:
        """Of what `make_shard` returned."""
        return cls(made["shard"], table_of(made["clips"], CLIPS_SCHEMA), made["sources"])

    @property
    def clips_s(self) -> float:
        """Seconds of all its clips."""
        return _seconds(self.clips)


def _seconds(clips: pa.Table) -> float:
    return float(pc.sum(pc.round(pc.subtract(clips["end_s"], clips["start_s"]), 4)).as_py() or 0.0)


def account_of(folder: Path, skipped: list[Skipped], done: list[ShardDone]) -> SplitReport:
    """The account of some shards. `skipped`: what is not in them, beside files that another was taken for."""
    outcomes = [outcome for shard in done for outcome in shard.sources]
    skipped = [*skipped, *_left(outcomes)]
    shards = [shard.shard for shard in done if shard.shard]
    failed = Counter(outcome["failure"]["reason"] for outcome in outcomes if outcome["failure"])
    return SplitReport(
        folder, found=len(outcomes) + len(skipped), written=len(outcomes) - failed.total(),
        skipped=Counter(entry.reason for entry in skipped), failed=failed,
        other_lengths=sum("came_s" in outcome for outcome in outcomes), clips=_table(done).num_rows,
        clips_s=_seconds(_table(done)), bytes=sum(shard["filesize"] for shard in shards), shards=len(shards))


def _table(done: list[ShardDone]) -> pa.Table:
    return pa.concat_tables([CLIPS_SCHEMA.empty_table(), *(shard.clips for shard in done)])


def settle(folder: Path, dataset: str, split: str, spec: ClipSpec, listing: Listing,
           done: list[ShardDone], versions: tuple[str, str]) -> SplitReport:
    """Write failures.jsonl, the two tables, and last the index: all that a reader needs to know of the shards.

    Args:
        folder: of the split.
        dataset: its name.
        split: its name.
        spec: of the clips.
        listing: of the dataset; its sources play no part, the shards say what became of them.
        done: all shards, in order.
        versions: of the avprep and the ffmpeg that made them.
    """
    outcomes = [outcome for shard in done for outcome in shard.sources]
    skipped = [*listing.skipped, *_left(outcomes)]
    failures = [line for outcome in outcomes if (line := _failure(outcome))]
    failures.sort(key=lambda line: str(line["path"]))
    clips = _table(done)
    rows = [*map(_source_row, outcomes),
            *({"name": entry.name, "status": "skipped", "reason": entry.reason, "detail": entry.detail or None,
               "clips": 0} for entry in skipped)]
    rows.sort(key=lambda row: (row["name"], row.get("key") or ""))
    report = account_of(folder, listing.skipped, done)
    tables = {CLIPS: parquet_of(clips), SOURCES: parquet_of(table_of(rows, SOURCES_SCHEMA))}
    index = {
        "__kind__": "wids-shard-index-v1", "wids_version": 1,  # the layout of webdataset's shard index
        "name": f"{dataset}-{split}", "format": FORMAT, "format_version": FORMAT_VERSION,
        "dataset": dataset, "split": split, "spec": spec.to_json(), "classes": listing.classes,
        "multi_label": listing.multi_label, "counts": _counts(report, clips, len(listing.classes)),
        "made_by": dict(zip(("avprep", "ffmpeg"), versions, strict=True)),
        "manifest": [entry_of(CLIPS, tables[CLIPS], clips.num_rows), entry_of(SOURCES, tables[SOURCES], len(rows))],
        "shardlist": [shard.shard for shard in done if shard.shard]}
    _write(folder, {FAILURES: _lines(failures), **tables,
                    INDEX: (json.dumps(index, ensure_ascii=False, indent=1) + "\n").encode()})
    return report


def _taken(outcome: dict[str, Any]) -> str:
    """The name of the file that was taken for a source."""
    return str(outcome["names"][outcome["taken"]])


def _left(outcomes: list[dict[str, Any]]) -> Iterator[Skipped]:
    """A line for each file that might have been taken for some source and was for none."""
    several = [outcome for outcome in outcomes if len(outcome["names"]) > 1]
    taken = set(map(_taken, outcomes)) if several else set()
    left: dict[str, Skipped] = {}
    for outcome in several:
        for name, reason in zip(outcome["names"], outcome["files"], strict=True):
            if name not in taken:
                why = f"; this one: {reason}" if reason else ""
                left[name] = Skipped(name, OTHER_FILE, f"{_taken(outcome)} was taken{why}")
    yield from left.values()


def _failure(outcome: dict[str, Any]) -> dict[str, Any] | None:
    """A line of failures.jsonl."""
    if outcome["failure"] is None:
        return None
    return {"source": outcome["key"], "path": _taken(outcome), **outcome["failure"],
            "clips_written": outcome["clips_written"], "clips_failed": outcome["clips_failed"]}


def _source_row(outcome: dict[str, Any]) -> dict[str, Any]:
    failure = outcome["failure"] or {}
    return {"name": _taken(outcome), "key": outcome["key"], "status": "failed" if failure else "written",
            "reason": failure.get("reason"), "detail": failure.get("detail") or None,
            "clips": outcome["clips_written"], "promised_s": outcome.get("promised_s"), "came_s": outcome.get("came_s")}


def _counts(report: SplitReport, clips: pa.Table, classes: int) -> dict[str, Any]:
    labels, missing, marks = (Counter(pc.list_flatten(clips[name]).to_pylist())
                              for name in ("labels", "missing", "marks"))
    return {
        "sources_found": report.found, "sources_written": report.written,
        "sources_skipped": dict(sorted(report.skipped.items())), "sources_failed": dict(sorted(report.failed.items())),
        "clips": report.clips, "seconds": round(report.clips_s, 3), "bytes": report.bytes,
        "without_sound": missing["sound"], "without_picture": missing["picture"],
        "marks": dict(sorted(marks.items())), "clips_per_class": [labels[number] for number in range(classes)]}


def _lines(lines: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Write what differs from what is there, the last one last; until then it is away, as it would not fit."""
    different = [name for name, content in files.items() if not _holds(folder / name, content)]
    if different:
        (folder / list(files)[-1]).unlink(missing_ok=True)
        for name in dict.fromkeys([*different, list(files)[-1]]):
            write_whole(folder / name, files[name])


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False
