"""`make demo-report`: what the tiny preset learns on the demo, over three seeds, measured on the demo's test split."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean

from avtrain.config import Config, read_config
from avtrain.runtime import choose_runtime
from avtrain.transfer.start import load_source, random_source
from benchmarks.learned import add_force, held_out_figures, in_one_line, minutes_of, probe, recalls, trained_on_demo

PRESET = "tiny"


def main() -> None:
    """Train what is not trained yet (a run that was stopped goes on), and print one table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, default=Path("shards/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo-report"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    add_force(parser)
    options = parser.parse_args()
    table: dict[str, list[float]] = defaultdict(list)
    chances: dict[str, float] = {}
    settings = [f"training.steps={options.steps}"] if options.steps else []
    minutes = [one_seed(read_config(PRESET, [*settings, f"training.seed={seed}"]), options.shards,
                        options.out / f"seed-{seed}", table, chances, options.force) for seed in options.seeds]
    print(f"\nTraining: {mean(minutes):.1f} minutes a seed on this machine. In percent, on the demo's test split.\n")
    print("| | " + " | ".join(f"seed {seed}" for seed in options.seeds) + " | mean | chance |")
    print("|---" * (len(options.seeds) + 3) + "|")
    for name, values in table.items():
        chance = f"{100 * chances[name]:.1f}" if name in chances else ""
        print(f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in values)
              + f" | {100 * mean(values):.1f} | {chance} |")


def one_seed(config: Config, shards: Path, folder: Path, table: dict[str, list[float]],
             chances: dict[str, float], force: bool) -> float:
    """Train and measure one seed: adds a value to every row of the table; the minutes of training."""
    seed, runtime = config.training.seed, choose_runtime(None, "auto")
    checkpoint = trained_on_demo(config, shards, folder, runtime, force)
    figures = held_out_figures(folder)
    for name, value in figures.items():
        if name.startswith("chance_"):
            continue
        label = name.replace("masked_top1_", "masked top-1 of 100: ").replace("_", " ")
        table[label].append(value)
        if f"chance_{name}" in figures:  # not in runs of before it was recorded
            chances[label] = figures[f"chance_{name}"]
    for modality in ("visual", "audio"):
        start = random_source(PRESET, [], seed)
        label = f"linear classifier, {modality} embeddings"
        table[f"{label}, random start"].append(probe(start, modality, shards, folder / "start", seed, runtime, force))
        table[f"{label}, pretrained"].append(
            probe(load_source(checkpoint), modality, shards, folder, seed, runtime, force))
        chances[f"{label}, random start"] = chances[f"{label}, pretrained"] = 1 / 8
    to_picture, to_sound, chance = recalls(checkpoint, shards, folder, runtime)
    for label, recall in (("retrieval, sound to picture, recall@5", to_picture),
                          ("retrieval, picture to sound, recall@5", to_sound)):
        table[label].append(recall)
        chances[label] = chance
    return minutes_of(folder, config)


if __name__ == "__main__":
    in_one_line(main)
