"""The account of a split: every source ends as written, skipped or failed, and the index says what there is."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avprep import __version__
from avprep.datasets.source import Listing, Source
from avprep.errors import Reason, SourceFailed
from avprep.media import ffmpeg_version
from avprep.probe import SAME_LENGTH_S, Media
from avprep.shards import INDEX, write_whole
from avprep.spec import FORMAT, FORMAT_VERSION, ClipSpec


@dataclass
class SplitReport:
    """The account of one split. Sources: found = written + skipped + failed; a source of which some clips could not
    be made counts as failed, its other clips stay. `other_lengths`: written ones that are not as long as they say."""

    folder: Path
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


def reason_of(failure: SourceFailed) -> dict[str, str]:
    """A failure as it stands in failures.jsonl."""
    return {"stage": failure.stage, "reason": failure.reason.value, "detail": failure.detail}


def account(folder: Path, sources: list[Source], media: list[Media | SourceFailed], listing: Listing,
            markers: list[dict[str, Any]]) -> SplitReport:
    """Write failures.jsonl (one line a source), skipped.jsonl and remarks.jsonl, and count."""
    failures: dict[str, dict[str, Any]] = {}  # by the source's key
    for source, found in zip(sources, media, strict=True):
        if isinstance(found, SourceFailed):
            failures[source.key] = {"source": source.key, "path": source.name, **reason_of(found),
                                    "clips_written": 0, "clips_failed": 0}
    clips_of: dict[str, int] = defaultdict(int)
    for marker in markers:
        for clip in marker["clips"]:
            clips_of[clip["source"]] += 1
    for marker in markers:
        for failure in marker["failures"]:
            key = failure["source"]
            line = failures.setdefault(key, {**failure, "clips_written": clips_of[key], "clips_failed": 0})
            line["clips_failed"] += 1
    for source, found in zip(sources, media, strict=True):
        if isinstance(found, Media) and found.broken_off:
            failures.setdefault(source.key, {
                "source": source.key, "path": source.name, "stage": "probe", "reason": Reason.TRUNCATED.value,
                "detail": f"{found.length_s:.1f} of {found.promised_s or found.length_s:.1f} s are there",
                "clips_written": clips_of[source.key], "clips_failed": 0})
    report = SplitReport(folder, found=len(sources) + len(listing.skipped), written=len(sources) - len(failures))
    report.skipped.update(entry.reason for entry in listing.skipped)
    report.failed.update(failure["reason"] for failure in failures.values())
    clips = [clip for marker in markers for clip in marker["clips"]]
    report.clips, report.clips_s = len(clips), sum(clip["length_s"] for clip in clips)
    shards = [marker["shard"] for marker in markers if marker["shard"]]
    report.shards, report.bytes = len(shards), sum(shard["filesize"] for shard in shards)
    _write_lines(folder / "failures.jsonl", sorted(failures.values(), key=lambda line: str(line["path"])))
    _write_lines(folder / "skipped.jsonl", [
        {"path": entry.name, "reason": entry.reason, **({"detail": entry.detail} if entry.detail else {})}
        for entry in listing.skipped])
    remarks = [remark for source, found in zip(sources, media, strict=True)
               if isinstance(found, Media) and (remark := _other_length(source, found)) and source.key not in failures]
    report.other_lengths = len(remarks)
    _write_lines(folder / "remarks.jsonl", remarks)
    return report


def _other_length(source: Source, media: Media) -> dict[str, Any] | None:
    """What the container promised and what came, where they differ."""
    if media.promised_s is None or abs(media.promised_s - media.length_s) <= SAME_LENGTH_S:
        return None
    return {"path": source.name, "remark": "not as long as its headers say", "promised_s": round(media.promised_s, 3),
            "came_s": round(media.length_s, 3)}


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_index(folder: Path, dataset: str, split: str, spec: ClipSpec, listing: Listing,
                markers: list[dict[str, Any]], report: SplitReport) -> None:
    """Write `index.json`: all that a reader of the shards needs to know (shards/README.md)."""
    clips = [clip for marker in markers for clip in marker["clips"]]
    labels = Counter(label for clip in clips for label in clip["labels"])
    marks = Counter(mark for clip in clips for mark in clip["marks"])
    counts = {
        "sources_found": report.found, "sources_written": report.written,
        "sources_skipped": dict(sorted(report.skipped.items())), "sources_failed": dict(sorted(report.failed.items())),
        "clips": report.clips, "seconds": round(report.clips_s, 3), "bytes": report.bytes,
        "without_sound": sum("sound" in clip["missing"] for clip in clips),
        "without_picture": sum("picture" in clip["missing"] for clip in clips),
        "marks": dict(sorted(marks.items())),
        "clips_per_class": [labels[number] for number in range(len(listing.classes))]}
    index = {
        "__kind__": "wids-shard-index-v1", "wids_version": 1,  # the layout of webdataset's shard index
        "name": f"{dataset}-{split}", "format": FORMAT, "format_version": FORMAT_VERSION,
        "dataset": dataset, "split": split, "spec": spec.to_json(), "classes": listing.classes,
        "multi_label": listing.multi_label, "counts": counts,
        "made_by": {"avprep": __version__, "ffmpeg": ffmpeg_version()},
        "shardlist": [marker["shard"] for marker in markers if marker["shard"]]}
    write_whole(folder / INDEX, json.dumps(index, ensure_ascii=False, indent=1) + "\n")
