"""`python3 -m benchmarks.gpu`: run from the repository's root under any Python that has torch and numpy."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from avtrain.config import read_config
from benchmarks.gpu import correct, device, profiled, ranks, resume, shards, tiles
from benchmarks.gpu.report import Report
from benchmarks.gpu.steps import ALL, PLAIN, Bench, Setting

# Part: what it is, its share of the time.
PARTS = {1: ("versions and ceilings", 0.03), 2: ("correctness", 0.2), 3: ("step time", 0.47),
         4: ("from shards", 0.16), 5: ("exact resume", 0.08), 6: ("processes under torchrun", 0.06)}


def main() -> None:
    """Measure the parts asked for, as far as the time goes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="1,2,3,4,5,6", help="parts: " + ", ".join(
        f"{number} {title}" for number, (title, _) in PARTS.items()))
    parser.add_argument("--reference", type=Path, help="folder with the released code's outputs (avbert_outputs.npz)")
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every measure")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clips", type=int, nargs="+", default=[16, 24, 8], help="micro-batches; the first is used "
                        "for comparisons")
    parser.add_argument("--shard-clips", type=int, default=512, help="clips that part 4 makes")
    parser.add_argument("--measures", nargs="*", help="of part 3: only rows whose names hold one of these texts")
    options = parser.parse_args()
    only = sorted(int(part) for part in options.only.split(","))
    config = read_config(options.preset, options.set)
    where = torch.device(options.device)
    report = Report(options.out, 60 * options.minutes, {part: PARTS[part][1] for part in only})
    report.content |= {"arguments": {name: str(value) for name, value in vars(options).items()}}
    bench: list[Bench] = []

    def the_bench() -> Bench:
        if not bench:
            bench.append(Bench(config, where, max(options.clips)))
            bench[0].ceiling_tflops = report.content.get("ceiling_tflops", float("nan"))
        return bench[0]

    def fastest() -> Setting:
        """As found in part 3, with room for batches on their way."""
        return replace(the_bench().best or Setting(graphed="all"), clips=options.clips[0])

    with tempfile.TemporaryDirectory() as folder:
        runs: dict[int, Callable[[], None]] = {
            1: lambda: ceilings(report, where),
            2: lambda: correct.run(report, config, where, options.reference),
            3: lambda: steps(report, the_bench(), options.clips, options.measures),
            4: lambda: shards.run(report, the_bench(), fastest(), Path(folder), options.shard_clips),
            5: lambda: resume.run(report, options.preset, options.set, where, Path(folder)),
            6: lambda: ranks.run(report, options.preset, options.set, where)}
        for part in only:
            report.begin(part, PARTS[part][0])
            try:
                runs[part]()
            except Exception as error:  # the other parts still have something to show
                report.add(PARTS[part][0], {"error": f"{type(error).__name__}: {str(error)[:200]}"})


def ceilings(report: Report, where: torch.device) -> None:
    """Part 1."""
    report.measure("versions", lambda: device.versions(where))
    product = report.measure("bfloat16 matrix product", lambda: device.product_ceiling(where))
    copied = report.measure("copy on the device", lambda: device.copy_ceiling(where))
    report.content["ceiling_tflops"] = product["tflops"] if product else float("nan")
    report.content["copy_gb_per_s"] = copied["gb_per_s"] if copied else float("nan")


def steps(report: Report, bench: Bench, clips: list[int], measures: list[str] | None) -> None:
    """Part 3. Each row is a setting; those "plain +" and "all -" differ from the named one by that measure alone.

    Where the host is the slower one, a row's kernels_ms tells what a measure gives the device. They come after the
    profile, as a profiler slows the host down for good.
    """
    report.add("work of a training clip", {"tflop": bench.tflop_per_clip})
    first = clips[0]
    everything = Setting(clips=first, forms=ALL)
    plain = Setting(clips=first, forms=PLAIN, fused_optimizer=False, waits=True)
    ways = {"all, graphs": replace(everything, graphed="all"),
            "all, graphs of CNNs": replace(everything, graphed="cnns"), "all": everything,
            "all, graphs of CNNs, compiled Transformers": replace(everything, graphed="cnns", compiled="transformers")}
    fast = {f"{name}, {count} clips": replace(setting, clips=count) for name, setting in ways.items()
            for count in clips[:2]}
    fast |= {f"{name}, {count} clips": replace(setting, clips=count) for count in clips[2:]
             for name, setting in ways.items() if not setting.compiled}
    form = {name: plain_with for name, plain_with in (
        ("norm, shortcut and ReLU in one", {"norm": True}), ("that, gradients of two uses too", {"norm": True,
                                                                                                 "fork": True}),
        ("2-D stem", {"stem": True}), ("2-D stem, from bytes in one pass", {"stem": True, "kernels": True}),
        ("2-D pooling", {"pool": True}), ("pooling by our kernels", {"pool": True, "kernels": True}),
        ("2-D (1, k, k)", {"spatial": True}), ("2-D (1, 1, 1)", {"pointwise": "convolution"}),
        ("linear (1, 1, 1)", {"pointwise": "linear"}), ("3-D (k, 1, 1)", {"temporal": False}))}
    slow = {
        "all": everything,
        "all, without kernels for stem and for two uses": replace(everything, forms={"fork": False, "kernels": False}),
        "plain (nothing recomputed)": plain,
        **{f"plain + {name}": replace(plain, forms={**PLAIN, **change}) for name, change in form.items()},
        "plain + fused AdamW": replace(plain, fused_optimizer=True),
        "plain + no waiting": replace(plain, waits=False),
        "all, (1, 1, 1) linear": replace(everything, forms={**ALL, "pointwise": "linear"}),
        "all + cudnn.benchmark": replace(everything, search=True),
        "all, first stage run again": replace(everything, checkpointed=1),
        "plain, contiguous": replace(plain, channels_last=False),
    }

    def wanted(name: str) -> bool:
        return not measures or any(text in name for text in measures)

    for name, setting in fast.items():
        if wanted(name):
            report.measure(name, lambda setting=setting: bench.measure(setting), 25 if setting.compiled else 4,
                           60 if setting.compiled else 0)
    if bench.device.type == "cuda" and wanted("norm kernels"):
        tiles.run(report, bench, first)
    if not measures and bench.best is not None:
        best = bench.best
        report.measure("phases of the fastest step, ms", lambda: profiled.phases(bench, best), 4)
        report.measure("kernels of the fastest step, ms", lambda: profiled.kernels(bench, best), 15)
    for name, setting in slow.items():
        if wanted(name):
            report.measure(f"{name}; with kernels", lambda setting=setting: bench.measure(setting, profiled=True), 6)
    compiled = replace(everything, forms={**ALL, "norm": False}, compiled="stages")
    if wanted("compiled stages"):
        report.measure("all - norm in one + compiled stages", lambda: bench.measure(compiled), 40,
                       report.left())


if __name__ == "__main__":
    main()
