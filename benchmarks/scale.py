"""`python -m benchmarks.scale`: clips a second by executor, workers and store, and planning against rows of the list,
as tables and a picture. Exit code 1 where a promise is not kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.building import MOST_RAY, Built, Way, measure
from benchmarks.planning import PROMISED, Planned, planned


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3, help="of what Ray is compared with")
    parser.add_argument("--out", type=Path, default=Path("runs/scale.png"), help="the picture to draw")
    parser.add_argument("--quick", action="store_true", help="a few rows and clips: does it run? No promise is judged")
    asked = parser.parse_args()
    few_clips = 4
    if asked.quick:
        asked.rows, asked.clips, asked.rounds, few_clips = [100, 1_000], 1, 1, 0
    plans = _print_plans(asked.rows)  # first: a child's peak of memory counts what this process had when it began it
    with tempfile.TemporaryDirectory() as scratch:
        builds = measure(asked.clips, asked.rounds, few_clips, Path(scratch))
    is_kept = _print_builds(builds)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    draw(builds, plans, asked.out)
    print(asked.out)
    return 0 if asked.quick or is_kept and all(plan.is_kept for plan in plans) else 1


def _print_builds(builds: dict[Way, Built]) -> bool:
    """A table; whether Ray costs as little as promised."""
    print("\n| executor | workers | raw files and shards in a | clips/s |\n|---|---:|---|---:|")
    for way, built in builds.items():
        print(f"| {way.executor} | {way.workers} | {way.where} | {built.clips / built.seconds:.2f} |")
    local, ray = (builds[Way(executor, 2, "folder")] for executor in ("local", "ray"))
    ratio = ray.seconds / local.seconds
    print(f"\nRay / local, 2 workers, {local.clips} clips between folders: {ratio:.2f} (medians of {len(ray.rounds)}: "
          f"{ray.seconds:.1f} s, {local.seconds:.1f} s); promised {MOST_RAY:g}: {_kept(ratio <= MOST_RAY)}")
    return ratio <= MOST_RAY


def _print_plans(sizes: list[int]) -> list[Planned]:
    """A table, row by row."""
    plans: list[Planned] = []
    print("| rows | plan, s | plan, MB | first build, s | again, s |\n|---:|---:|---:|---:|---:|")
    for rows in sizes:
        plan = planned(rows)
        plans.append(plan)
        print(f"| {rows:,} | {plan.plan_s:.1f} | {plan.plan_mb:.0f} | {plan.first_s:.1f} | {plan.again_s:.1f} |",
              flush=True)
    print(f"\npromised: {PROMISED}: {_kept(all(plan.is_kept for plan in plans))}")
    return plans


def _kept(is_kept: bool) -> str:
    return "kept" if is_kept else "NOT KEPT"


def draw(builds: dict[Way, Built], plans: list[Planned], path: Path) -> None:
    """Bars of clips a second; lines of seconds over rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    speed, time = figure.subplots(1, 2)
    groups = list(dict.fromkeys((way.workers, way.where) for way in builds))
    for side, executor in ((-0.2, "local"), (0.2, "ray")):
        heights = [builds[Way(executor, *group)].clips / builds[Way(executor, *group)].seconds for group in groups]
        bars = speed.bar([at + side for at in range(len(groups))], heights, 0.4, label=executor)
        speed.bar_label(bars, fmt="%.2f", fontsize=8)
    names = [f"{workers} worker{'s' * (workers > 1)}, {where}" for workers, where in groups]
    speed.set_xticks(range(len(groups)), names)
    speed.set(title="avprep build", ylabel="clips a second")
    speed.margins(y=0.25)  # for the legend
    for what, label in (("plan_s", "plan"), ("first_s", "first build, shards made by a stand-in"),
                        ("again_s", "finished build again")):
        time.plot([plan.rows for plan in plans], [getattr(plan, what) for plan in plans], "o-", label=label)
    time.set(title="against rows of the list", xlabel="rows", ylabel="seconds", xscale="log", yscale="log")
    time.grid(alpha=0.3)
    for axis in (speed, time):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    sys.exit(main())
