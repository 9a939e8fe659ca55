"""`make ablations`: the tiny preset over fusion, negatives and sharing: one table, one plot. One seed, short runs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from avtrain.config import Config, read_config
from avtrain.models.avbert import AVBert
from avtrain.runtime import choose_runtime
from avtrain.transfer.start import load_source
from benchmarks.learned import add_force, held_out_figures, in_one_line, probe, recalls, trained_on_demo

# study -> setting -> fields of the model's or the objectives' settings
STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "fusion": {name: {"fusion": name} for name in ("early", "mid", "late")},
    "negatives": {name: {"sampling": name} for name in ("similar", "dissimilar", "random")},
    "sharing": {
        "none": {"share_layers": False, "share_transformers": False, "rank": None},
        "layers": {"share_transformers": False, "rank": None},
        "layers + Transformers": {"rank": None},
        "layers + Transformers, low rank": {},
    },
}


def main() -> None:
    """Train every setting (equal ones once; a run that was stopped goes on), print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, default=Path("shards/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--steps", type=int, default=300, help="of each run; the schedule is that long")
    add_force(parser)
    options = parser.parse_args()
    figures: dict[Config, dict[str, float]] = {}
    rows: list[tuple[str, str, dict[str, float]]] = []
    for study, settings in STUDIES.items():
        for name, fields in settings.items():
            config = with_fields(options.steps, fields)
            if config not in figures:
                folder = options.out / f"{len(figures)}-{study}-{name}"
                figures[config] = measured(config, options.shards, folder, options.force)
            rows.append((study, name, figures[config]))
    columns = list(dict.fromkeys(column for _, _, of_one in rows for column in of_one))
    lines = ["| study | setting | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    lines += [f"| {study} | {name} | " + " | ".join(_shown(column, of_one.get(column)) for column in columns) + " |"
              for study, name, of_one in rows]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "ablations.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(rows, [column for column in columns if column != "parameters"], options.out / "ablations.png")
    print("\n" + "\n".join(lines) + f"\n\n{options.out}/ablations.md, {options.out}/ablations.png")


def with_fields(steps: int, fields: dict[str, Any]) -> Config:
    """The tiny preset with other fields and its schedule shortened."""
    config = read_config("tiny", [f"training.steps={steps}"])
    of_objectives = {name: value for name, value in fields.items() if name == "sampling"}
    of_model = {name: value for name, value in fields.items() if name not in of_objectives}
    return replace(config, model=replace(config.model, **of_model),
                   objectives=replace(config.objectives, **of_objectives))


def measured(config: Config, shards: Path, folder: Path, force: bool) -> dict[str, float]:
    """Train, and measure on the test split; all but the parameters in parts of 1."""
    runtime = choose_runtime(None, "auto")
    checkpoint = trained_on_demo(config, shards, folder, runtime, force)
    encoder = AVBert(config.model).encoder
    figures = {"parameters": float(sum(parameter.numel() for parameter in encoder.parameters()))}
    held_out = held_out_figures(folder)
    if "pair_accuracy" in held_out:
        figures["pair accuracy"] = held_out["pair_accuracy"]
    for modality in ("visual", "audio"):
        # What the best-informed Transformer makes of it.
        figures[f"masked top-1, {modality}"] = max(value for name, value in held_out.items()
                                                   if name.startswith("masked") and name.endswith(modality))
        figures[f"linear, {modality}"] = probe(load_source(checkpoint), modality, shards, folder, 0, runtime, force)
    to_picture, to_sound, _ = recalls(checkpoint, shards, folder, runtime)
    return {**figures, "recall@5": (to_picture + to_sound) / 2}


def _shown(column: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if column == "parameters" else f"{100 * value:.1f}"


def draw(rows: list[tuple[str, str, dict[str, float]]], columns: list[str], path: Path) -> None:
    """A panel a study; a group of bars a figure, a bar a setting that has it, in percent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 10), layout="constrained")
    for axis, study in zip(figure.subplots(len(STUDIES), 1), STUDIES, strict=True):
        settings = [(name, of_one) for of_study, name, of_one in rows if of_study == study]
        width = 0.8 / len(settings)
        for number, (name, of_one) in enumerate(settings):
            found = [(index, of_one[column]) for index, column in enumerate(columns) if column in of_one]
            at = [index + (number - (len(settings) - 1) / 2) * width for index, _ in found]
            bars = axis.bar(at, [100 * value for _, value in found], width, label=name)
            axis.bar_label(bars, fmt="%.0f", fontsize=8)
        axis.set_xticks(range(len(columns)), columns)
        axis.set(title=study, ylabel="%")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    in_one_line(main)
