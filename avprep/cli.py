"""The `avprep` command: parses, calls, prints. Heavy imports stay inside the commands."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from avprep import __version__
from avprep.errors import AvprepError, NothingToBuild
from avprep.spec import ClipSpec

if TYPE_CHECKING:
    from avprep.account import SplitReport
    from avprep.build import BuildOptions

# Every worker is a thread that computes a log-mel now and then: BLAS threads of their own only get in the way.
# Read when numpy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

_SPEC = ClipSpec()
_DEMO_VIDEOS = {"train": 300, "test": 100}
_CONTEXT = {"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "AVPREP", "show_default": True}


class _Ended(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def _ends_as_by_ctrl_c() -> Iterator[None]:
    """What `kill` and schedulers send ends a command as Ctrl-C does; a second time, at once."""
    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Ended

    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Commands(click.Group):
    """Turns what is meant for people into one line and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        try:
            with _ends_as_by_ctrl_c():
                return super().invoke(context)
        except AvprepError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise click.ClickException(f"{error.filename or 'system'}: {error.strerror or error}") from error
        except KeyboardInterrupt as interrupt:
            click.echo("\ninterrupted: finished shards stay; run the same command again to go on", err=True)
            raise click.exceptions.Exit(143 if isinstance(interrupt, _Ended) else 130) from None


@click.group(cls=_Commands, context_settings=_CONTEXT)
@click.version_option(__version__)
def main() -> None:
    """Raw videos to WebDataset shards of 30-s clips with log-mel spectrograms.

    Every option can also be set as AVPREP_COMMAND_OPTION, for example AVPREP_BUILD_WORKERS=8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files and classes may be anything


def _storage_options(command: Callable[..., None]) -> Callable[..., None]:
    return click.option("--storage-options", metavar="JSON", default="{}", envvar="AVPREP_STORAGE_OPTIONS",
                        show_default=False,
                        help="For stores, beside what their own environment variables say.")(command)


def _known_dataset(context: click.Context, param: click.Parameter, value: str) -> str:
    from avprep.datasets import DATASETS  # only when it is needed: `avprep --help` stays quick

    return str(click.Choice(list(DATASETS)).convert(value, param, context))


@main.command()
@click.option("--split", default="train", help="A split of the dataset, or all.")
@click.option("--dataset", callback=_known_dataset, default="kinetics700",
              help="kinetics700/600/400, kinetics-sounds, audioset, ucf101, esc50, esc10, charades, folder or demo.")
@click.option("--raw", metavar="FOLDER", help="Folder of raw files, or its address (s3:// ...).  "
              "[default: data/DATASET]")
@click.option("--out", metavar="FOLDER", default="shards",
              help="Shards go to OUT/DATASET/SPLIT; an address (s3:// ...), too.")
@_storage_options
@click.option("--workers", type=click.IntRange(1), show_default="all cores",
              help="Clips made at the same time; with Ray, by each of its tasks (a task makes a shard).")
@click.option("--executor", type=click.Choice(["local", "ray"]), default="local", help="Where clips are made.")
@click.option("--ray-address", metavar="ADDRESS", show_default="RAY_ADDRESS, or one on this machine",
              help="The Ray cluster: HOST:PORT, ray://HOST:PORT, or auto.")
@click.option("--part", metavar="I/N", help="Make the I-th of N ranges of the shards only; then `avprep merge`.")
@click.option("--limit", type=click.IntRange(1), help="At most so many source files a split.")
@click.option("--force", is_flag=True, help="Build anew what is already there.")
@click.option("--shard-mb", type=click.FloatRange(0.001), default=256.0, help="Size of a shard, about.")
@click.option("--timeout", type=click.FloatRange(0.01), default=600.0, help="Seconds that one clip may take.")
@click.option("--fps", type=int, default=_SPEC.fps, help="Frames per second of the clips.")
@click.option("--frames", type=int, default=_SPEC.frames, help="Frames of a full clip.")
@click.option("--segment-frames", type=int, default=_SPEC.segment_frames, help="Frames of a segment.")
@click.option("--short-side", type=int, default=_SPEC.short_side, help="Pixels; smaller pictures stay.")
@click.option("--crf", type=int, default=_SPEC.crf, help="H.264 quality, 0 (lossless) to 51.")
def build(split: str, dataset: str, raw: str | None, out: str, storage_options: str, workers: int | None, executor: str,
          ray_address: str | None, part: str | None, limit: int | None, force: bool, shard_mb: float, timeout: float,
          **spec: int) -> None:
    """Turn a dataset's raw files into shards; run again to go on after an interruption."""
    from avprep.build import BuildOptions
    from avprep.mirror import raw_mirror
    from avprep.state import read_part
    from avprep.storage import Store, is_remote, local_path

    for name, value in (("--shard-mb", shard_mb), ("--timeout", timeout)):
        if not math.isfinite(value):
            raise AvprepError(f"{name} {value}: a number is wanted")
    if ray_address is not None and executor != "ray":
        raise AvprepError("--ray-address is for --executor ray")
    raw = raw or f"data/{dataset}"
    options = BuildOptions(dataset, local_path(raw), local_path(out), ClipSpec(**spec), workers, int(shard_mb * 1e6),
                           timeout, limit, force, executor, ray_address, read_part(part) if part else None,
                           out_store=Store(out, storage_options) if is_remote(out) else None)
    if is_remote(raw):
        store = Store(raw, storage_options)
        with raw_mirror(store) as (folder, unusable):
            _build_splits(replace(options, raw=folder, raw_store=store, unusable=tuple(unusable)), split, out)
        return
    if dataset == "demo" and not options.raw.exists():
        from avprep.demo import make_demo

        click.echo(f"making the demo dataset in {raw}")
        make_demo(options.raw, workers or os.cpu_count() or 1, _DEMO_VIDEOS)
    _build_splits(options, split, out)


def _build_splits(options: BuildOptions, split: str, out: str) -> None:
    """Build a split, or all, and say what came of each."""
    from avprep.build import build_split, check_raw, choose_splits
    from avprep.mirror import named

    dataset, part = options.dataset, options.part
    clips = 0
    with named(options.raw, options.raw_store):
        check_raw(dataset, options.raw)
        splits = choose_splits(dataset, options.raw, split)
    for name in splits:
        try:
            report = build_split(options, name)
        except NothingToBuild as nothing:
            if len(splits) == 1:
                raise
            click.echo(f"{dataset} {name}: {nothing}", err=True)
            continue
        clips += report.clips
        _print_report(f"{dataset} {name}" + (f", part {part}" if part else ""), report)
        if part:
            click.echo(f"  when all parts are done: avprep merge {out}")
        else:
            _print_files(report)
    if clips == 0 and part is None:  # a part may well have no shard
        raise click.ClickException("not one clip could be written: see what is said above, and failures.jsonl")


def _print_report(title: str, report: SplitReport, built: bool = True) -> None:
    """What became of a split. `built`: not merged, so it may say how long that took."""
    def by_reason(counts: dict[str, int]) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        return f"{sum(counts.values())}" + (f" ({reasons})" if reasons else "")

    click.echo(f"{title}: {report.found} files found = {report.written} written + {by_reason(report.skipped)} skipped "
               f"+ {by_reason(report.failed)} failed")
    click.echo(f"  {report.clips} clips, {report.clips_s / 3600:.2f} h, {report.bytes / 1e6:.1f} MB in {report.shards} "
               f"shards")
    if report.new_clips_s:
        click.echo(f"  {report.elapsed_s:.1f} s: {report.new_clips_s / report.elapsed_s:.0f} seconds of video a second")
    elif built:
        click.echo("  all shards were there already (--force builds anew)")
    if report.other_lengths:
        click.echo(f"  {report.other_lengths} of them not as long as their headers say: used as long as they are")


def _print_files(report: SplitReport) -> None:
    """Where the account of a split lies."""
    accounts = [name for name, counts in (("failures.jsonl", report.failed),
                                          ("sources.parquet", report.skipped or report.other_lengths)) if counts]
    click.echo(", ".join([f"  {report.folder}/index.json", *(f"{report.folder}/{name}" for name in accounts)]))


@main.command()
@click.argument("outs", metavar="OUT...", nargs=-1, required=True)
@_storage_options
def merge(outs: tuple[str, ...], storage_options: str) -> None:
    """Make one build of the parts of `avprep build --part`: write index and tables, as an undivided build does.

    Where the parts lie in several folders, the shards of all go into the first, as links or copies. In a store (s3://
    ...) all parts lie in one folder.
    """
    from avprep.parts import find_parts
    from avprep.parts import merge as merge_parts
    from avprep.storage import Store, is_remote, local_path

    if any(map(is_remote, outs)):
        from avprep.parts import merged_in_store

        if len(outs) > 1:
            raise AvprepError(f"{' '.join(outs)}: parts in a store are merged where they lie: name one address")
        reports = merged_in_store(Store(outs[0], storage_options))
    else:
        folders = [local_path(out) for out in outs]
        for out in folders:
            if not out.is_dir():
                raise AvprepError(f"no folder {out}")
        reports = ((records, merge_parts(records, folders[0])) for records in find_parts(folders))
    for records, report in reports:
        _print_report(f"{records[0].settings['dataset']} {records[0].settings['split']}, {len(records)} parts", report,
                      built=False)
        _print_files(report)


@main.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("data/demo"),
              help="Where the videos go, as SPLIT/CLASS/*.mp4.")
@click.option("--train", type=click.IntRange(1), default=_DEMO_VIDEOS["train"], help="Videos of the train split.")
@click.option("--test", type=click.IntRange(1), default=_DEMO_VIDEOS["test"], help="Videos of the test split.")
@click.option("--seed", type=int, default=0, help="Another seed gives other videos.")
@click.option("--workers", type=click.IntRange(1), default=os.cpu_count() or 1, show_default="all cores",
              help="Videos made at the same time.")
def demo(out: Path, train: int, test: int, seed: int, workers: int) -> None:
    """Make the small synthetic audio-visual dataset, as ordinary mp4 files."""
    from avprep.demo import make_demo

    if out.exists() and any(out.iterdir()):
        raise AvprepError(f"{out} is not empty: delete it first, or choose another folder with --out")
    make_demo(out, workers, {"train": train, "test": test}, seed)
    click.echo(f"{train + test} videos of 30 s in {out}; next: avprep build --dataset demo --split all --raw {out}")


@main.command()
@click.argument("location", metavar="SHARDS")
@click.option("--json", "as_json", is_flag=True, help="Print the indexes' counts as JSON.")
@_storage_options
def info(location: str, as_json: bool, storage_options: str) -> None:
    """Say what a folder of shards, or its address, holds: spec, counts, hours, bytes, labels, what is missing."""
    from avprep.manifest import clip_lengths_s
    from avprep.mirror import shards_at
    from avprep.shards import find_indexes, read_index

    with shards_at(location, storage_options) as shards:
        for path in find_indexes(shards.folder):
            index = read_index(path)
            if as_json:
                click.echo(json.dumps({"index": shards.shown(path), "spec": index["spec"], **index["counts"]}))
            else:
                _print_index(shards.shown(path), index, clip_lengths_s(path.parent, index))


def _print_index(path: str, index: dict[str, Any], lengths_s: tuple[float, float, float]) -> None:
    counts, spec = index["counts"], index["spec"]
    click.echo(f"{path}  (format {index['format_version']}, {index['dataset']} {index['split']})")
    click.echo(f"  clips    {counts['clips']} in {len(index['shardlist'])} shards, {counts['seconds'] / 3600:.2f} h, "
               f"{counts['bytes'] / 1e6:.1f} MB; {counts['without_sound']} without sound, "
               f"{counts['without_picture']} without picture")
    click.echo("  lengths  shortest {:.1f} s, median {:.1f} s, longest {:.1f} s".format(*lengths_s))
    click.echo(f"  sources  {counts['sources_found']} found, {counts['sources_written']} written, "
               f"{sum(counts['sources_skipped'].values())} skipped, {sum(counts['sources_failed'].values())} failed")
    if counts["marks"]:
        click.echo("  marked   " + ", ".join(f"{count} {mark}" for mark, count in counts["marks"].items()))
    click.echo("  spec     " + ", ".join(f"{name} {value}" for name, value in spec.items()))
    most = max(counts["clips_per_class"], default=0)
    width = max((len(name) for name in index["classes"]), default=0)
    for name, count in zip(index["classes"], counts["clips_per_class"], strict=True):
        click.echo(f"  {name:<{width}}  {count:>7}  {'█' * round(30 * count / most) if most else ''}")


@main.command()
@click.argument("location", metavar="SHARDS")
@click.option("--against", "raw", type=click.Path(path_type=Path), metavar="RAW",
              help="The folder of raw files: also compare clips with their sources there, in time, level and length.")
@click.option("--clips", metavar="N", show_default="20",
              help="With --against: clips of each index to compare, spread over its shards; 0 or all: every one.")
@_storage_options
def verify(location: str, raw: Path | None, clips: str | None, storage_options: str) -> None:
    """Check shards in a folder or at an address against their index: checksums, counts, and that every clip can be
    decoded.
    """
    from avprep.inspect.verify import problems_of
    from avprep.mirror import shards_at
    from avprep.shards import find_indexes

    compared = _clips_to_compare(raw, clips)
    found = different = 0
    with shards_at(location, storage_options) as shards:
        for path in find_indexes(shards.folder):
            for problem in problems_of(path, shards):
                click.echo(shards.shown(problem))
                found += 1
            click.echo(f"{shards.shown(path)}: checked")
            if raw is not None:
                from avprep.inspect.against import differences, sample

                sampled = sample(path, compared, shards)
                for problem in differences(sampled, raw):
                    click.echo(shards.shown(problem))
                    different += 1
                click.echo(f"{shards.shown(path)}: {len(sampled)} clips compared with their sources")
    if found:
        raise click.ClickException(f"{found + different} problem(s): delete the bad shards and run `avprep build` "
                                   "again")
    if different:
        raise click.ClickException(f"{different} problem(s): clips differ from their sources; if {raw} is what they "
                                   "were made from, build them again with --force")


def _clips_to_compare(raw: Path | None, clips: str | None) -> int:
    """What `--clips` says; 0 for all."""
    if raw is None and clips is not None:
        raise AvprepError("--clips says how many clips to compare with their sources: name these with --against RAW")
    if raw is not None and not raw.is_dir():
        raise AvprepError(f"{raw} is not a folder: name the one that was given to `avprep build` as --raw")
    if clips == "all":
        return 0
    if clips is not None and not (clips.isascii() and clips.isdigit()):
        raise AvprepError(f"--clips is {clips}: it must be a number of clips, or all")
    return 20 if clips is None else int(clips)


@main.command()
@click.argument("location", metavar="SHARDS")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), default=Path("sheet.png"),
              help="The picture to write.")
@click.option("--clips", type=click.IntRange(1, 50), default=8, help="Clips to show.")
@_storage_options
def preview(location: str, output: Path, clips: int, storage_options: str) -> None:
    """Draw a contact sheet of the SHARDS in a folder or at an address: frames across each clip over its log-mel, with
    labels and time axis.
    """
    from avprep.inspect.preview import contact_sheet
    from avprep.mirror import shards_at

    with shards_at(location, storage_options) as shards:
        shown = contact_sheet(shards, output, clips)
    click.echo(f"{shown} clips drawn in {output}")

if __name__ == "__main__":
    main()
