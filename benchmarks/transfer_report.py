"""`make transfer-report`: the demo by every protocol and modality, from a random start and pretrained: one table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from avtrain.config import read_config
from avtrain.runtime import choose_runtime
from avtrain.transfer.protocols import PROTOCOLS
from avtrain.transfer.start import load_source, random_source
from benchmarks.learned import add_force, in_one_line, trained_on_demo, transferred

PRESET = "tiny"


def main() -> None:
    """Pretrain if that is not done yet (as seed 0 of `make demo-report`), transfer, print one table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, default=Path("shards/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo-report/seed-0"))
    parser.add_argument("--steps", type=int, help="of pretraining, instead of the preset's")
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=PROTOCOLS)
    add_force(parser)
    options = parser.parse_args()
    runtime = choose_runtime(None, "auto")
    settings = [f"training.steps={options.steps}"] if options.steps else []
    config = read_config(PRESET, settings)
    checkpoint = trained_on_demo(config, options.shards, options.out, runtime, options.force)
    lines = []
    for protocol in options.protocols:
        for modality in ("visual", "audio", "both"):
            start, after = (transferred(source, protocol, modality, options.shards, folder, config.training.seed,
                                        runtime, options.force)
                            for source, folder in ((random_source(PRESET, [], config.training.seed),
                                                    options.out / "start"), (load_source(checkpoint), options.out)))
            lines.append(f"| {protocol}, {modality} | {_shown(start)} | {_shown(after)} | "
                         f"{after['percent'] - start['percent']:+.1f} |")
    print("\nTop-1 on the demo's test clips in percent, with 95 % bootstrap intervals; chance is 12.5.\n")
    print("| protocol, modality | random start | pretrained | gap |\n|---|---|---|---|")
    print("\n".join(lines))


def _shown(top1: dict[str, Any]) -> str:
    low, high = top1["interval_95"]
    return f"{top1['percent']:.1f} ({low:.0f} to {high:.0f})"


if __name__ == "__main__":
    in_one_line(main)
