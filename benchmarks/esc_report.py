"""`make esc-report`: ESC-10's five folds from a random start, and from pretraining on sound alone: one table.

For every fold a network is pretrained on the recordings of the four others and on the demo's sound. No recording of the
fold that is tested on is ever seen.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from avtrain.config import Config, read_config
from avtrain.runtime import Runtime, choose_runtime
from avtrain.transfer.evaluate import Trial, evaluate_task
from avtrain.transfer.predictions import Metric, mean_metrics, metrics_of
from avtrain.transfer.protocols import protocol_for
from avtrain.transfer.results import read_predictions
from avtrain.transfer.start import Start, load_source, random_source
from benchmarks.learned import add_force, in_one_line, trained

PRESET = "sound"
WAYS = (("linear", "published"), ("linear", "small"), ("finetune", "small"))  # protocol, recipe
FOLDS = ("1", "2", "3", "4", "5")


def main() -> None:
    """Train what is not trained yet (a run that was stopped goes on), and print one table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, default=Path("shards"), help="folder that holds esc10 and demo")
    parser.add_argument("--out", type=Path, default=Path("runs/esc-report"))
    parser.add_argument("--folds", nargs="+", default=FOLDS, choices=FOLDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="of the preset or transfer.*")
    add_force(parser)
    options = parser.parse_args()
    of_transfer = [override for override in options.overrides if override.startswith("transfer.")]
    of_preset = [override for override in options.overrides if override not in of_transfer]
    config = read_config(PRESET, [*of_preset, f"training.seed={options.seed}"])
    runtime = choose_runtime(None, "auto")
    checkpoints = {fold: pretrained(config, fold, options.shards, options.out, runtime, options.force)
                   for fold in options.folds}
    rows: dict[str, list[dict[str, Metric]]] = {}
    minutes: dict[str, str] = {}
    for name, recipe in WAYS:
        trial = Trial("esc10", protocol_for("esc10", name, recipe, of_transfer), "audio", seed=options.seed)
        for start in ("random", "pretrained"):
            began, label = time.monotonic(), f"{start}, {name} ({recipe})"
            found = [
                transferred(random_source(PRESET, of_preset, options.seed) if start == "random"
                            else load_source(checkpoints[fold]),
                            trial, fold, options.shards, options.out / start / f"{name}-{recipe}-fold{fold}",
                            options.out / start / "features", runtime, options.force) for fold in options.folds]
            rows[label] = [of_fold for of_fold, _ in found]
            whole = not any(before for _, before in found)  # what was done by an earlier run took no time in this one
            minutes[label] = f"{(time.monotonic() - began) / 60:.1f}" if whole else ""
    print("\nESC-10, top-1 in percent; the mean with its 95 % bootstrap interval over recordings.\n")
    print("| start, protocol (recipe) | " + "".join(f"fold {fold} | " for fold in options.folds) + "mean | minutes |")
    print("|---" * (len(options.folds) + 3) + "|")
    for label, of_folds in rows.items():
        mean = mean_metrics(of_folds)["top1"]
        low, high = mean.interval()
        print(f"| {label} | " + " | ".join(f"{fold['top1'].value:.1f}" for fold in of_folds)
              + f" | {mean.value:.1f} ({low:.1f} to {high:.1f}) | {minutes[label]} |")


def pretrained(config: Config, fold: str, shards: Path, out: Path, runtime: Runtime, force: bool) -> Path:
    """The checkpoint of what was learned from the sound of the other folds and of the demo."""
    others = [shards / "esc10" / f"fold{other}" for other in FOLDS if other != fold]
    return trained(config, [*others, shards / "demo" / "train"], [], out / f"pretrained-without-fold{fold}", runtime,
                   force)


def transferred(source: Start, trial: Trial, fold: str, shards: Path, out: Path, cache: Path,
                runtime: Runtime, force: bool) -> tuple[dict[str, Metric], bool]:
    """`avtrain eval --task esc10 --split FOLD`, in figures that can be averaged over folds; whether it was done before.
    """
    done = evaluate_task(source, trial, [fold], str(shards), out, cache, runtime, force)
    return metrics_of(read_predictions(out / "predictions.jsonl"), False, trial.seed), done.before


if __name__ == "__main__":
    in_one_line(main)
