"""What a run came to, from its folder alone: curves as a picture, and one page with the figures beside chance."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from avtrain import __version__
from avtrain.config import Config, config_from, config_to
from avtrain.errors import AvtrainError
from avtrain.files import written_whole
from avtrain.pretraining.held_out import CANDIDATES
from avtrain.run_folder import CONFIG, METRICS, Line, RunFolder, read_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = "report.html"
PICTURE_PIXELS = (1600, 1200)
_DPI = 100
_ROWS, _COLUMNS = 3, 3
_COLOURS = {"visual": "#0072b2", "audio": "#d55e00", "multimodal": "#009e73"}
_LAST_SHARE = 0.05  # curves are means over this share of a run's steps, and so is the table's training figure


@dataclass(frozen=True)
class _Curve:
    """One line of a panel: a figure's name in metrics.jsonl, how it is called, its colour."""

    name: str
    label: str
    colour: str = "#333333"


@dataclass(frozen=True)
class _Panel:
    title: str
    curves: list[_Curve]
    percent: bool = False


_PANELS = [
    _Panel("total loss", [_Curve("loss", "all parts, weighted")]),
    _Panel("masked prediction in one modality, loss", [
        _Curve("mep_visual", "visual", _COLOURS["visual"]), _Curve("mep_audio", "audio", _COLOURS["audio"])]),
    _Panel("masked prediction in both, loss", [
        _Curve("mep_multimodal", "visual + audio", _COLOURS["multimodal"])]),
    _Panel("pair prediction, loss", [_Curve("pair", "same video or not", "#cc79a7")]),
    _Panel("pair accuracy", [_Curve("pair_accuracy", "same video or not", "#cc79a7")], percent=True),
    _Panel("masked top-1 among the batch's negatives", [
        _Curve("top1_visual", "visual", _COLOURS["visual"]), _Curve("top1_audio", "audio", _COLOURS["audio"]),
        _Curve("top1_multimodal_visual", "multimodal, visual", "#56b4e9"),
        _Curve("top1_multimodal_audio", "multimodal, audio", "#e69f00")], percent=True),
    _Panel(f"held out: masked top-1 of up to {CANDIDATES} random ones", [
        _Curve("masked_top1_visual", "visual", _COLOURS["visual"]),
        _Curve("masked_top1_audio", "audio", _COLOURS["audio"]),
        _Curve("masked_top1_multimodal_visual", "multimodal, visual", "#56b4e9"),
        _Curve("masked_top1_multimodal_audio", "multimodal, audio", "#e69f00")], percent=True),
]


def chance_of(name: str, lines: list[Line]) -> float | None:
    """What a figure would be for a model that knows nothing, as the run has recorded it.

    Args:
        name: of a figure in metrics.jsonl, without test_.
        lines: of metrics.jsonl.

    Returns:
        That of the last evaluation, or the mean over the last steps where the figure is of training alone; None where
        it is not recorded.
    """
    _, held_out = _series(lines, f"test_chance_{name}")
    _, training = _series(lines, f"chance_{name}")
    recent = held_out[-1:] or training[-_window(len(training)):]
    return sum(recent) / len(recent) if recent else None


def held_out_text(figures: Line) -> list[str]:
    """What an evaluation found, beside chance: lines for people."""
    lines = []
    for name, value in figures.items():
        what, prefix, predictor = name.rpartition("test_masked_top1_")
        chance = figures.get(f"test_chance_{name.removeprefix('test_')}")
        if chance is None or what:
            continue
        if name == "test_pair_accuracy":
            lines.append(f"held-out pair accuracy {100 * value:.1f} % (chance {100 * chance:.3g} %)")
        elif prefix:
            where = predictor.replace("_", " Transformer, ")
            lines.append(f"held-out masked top-1 of {round(1 / chance)} candidates, {where}: {100 * value:.1f} % "
                         f"(chance {100 * chance:.3g} %)")
    return lines


def write_report(folder: Path) -> list[Path]:
    """Write `report.png` and `report.html` into a run's folder, from its `metrics.jsonl` and `config.json`.

    Returns:
        The two paths, the page first.

    Raises:
        AvtrainError: the folder holds no pretraining run, or one without a single step.
        OSError: a file can't be read or written.
    """
    config, lines = _read_run(folder)
    picture = _picture(lines)
    page = _page(folder.resolve().name, lines, config, picture)
    written = []
    for name, content in ((PAGE, page.encode()), ("report.png", picture)):
        with written_whole(folder / name) as temporary:
            temporary.write_bytes(content)
        written.append(folder / name)
    return written


def is_current(folder: Path) -> bool:
    """Whether a run's page was drawn after its last step."""
    page, metrics = folder / PAGE, folder / METRICS
    return page.is_file() and metrics.is_file() and page.stat().st_mtime_ns >= metrics.stat().st_mtime_ns


def _read_run(folder: Path) -> tuple[Config, list[Line]]:
    for name in (CONFIG, METRICS):
        if not (folder / name).is_file():
            raise AvtrainError(f"{folder} has no {name}: name the folder of a run of `avtrain pretrain`")
    lines = RunFolder(folder).lines()
    if not lines:
        raise AvtrainError(f"{folder}: the run has not made a step yet")
    return config_from(read_settings(folder / CONFIG), str(folder / CONFIG)), lines


def _series(lines: list[Line], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a figure, where it was measured and finite."""
    points = [(line["step"], line[name]) for line in lines if name in line and math.isfinite(line[name])]
    return [step for step, _ in points], [value for _, value in points]


def _window(count: int) -> int:
    return max(1, round(_LAST_SHARE * count))


def _smoothed(values: list[float]) -> list[float]:
    """The mean of each value and those before it, over a window; at the start over what there is."""
    window, total, means = _window(len(values)), 0.0, []
    for number, value in enumerate(values):
        total += value - (values[number - window] if number >= window else 0.0)
        means.append(total / min(number + 1, window))
    return means


def _picture(lines: list[Line]) -> bytes:
    """The curves, as a PNG of `PICTURE_PIXELS`."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    width, height = PICTURE_PIXELS
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI,
                    layout=ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.14))
    figure.suptitle(f"lines: training, each the mean of {_window(len(lines))} steps   ·   points: held-out clips   ·   "
                    "dashed: chance", fontsize=11, color="#555555")
    axes = figure.subplots(_ROWS, _COLUMNS).flatten()
    for axis, panel in zip(axes, _PANELS, strict=False):
        _draw(axis, panel, lines)
    _draw_rate(axes[-2], lines)
    _draw_speed(axes[-1], lines)
    for axis in axes:
        axis.set_xlim(0, max(2, lines[-1]["step"]) * 1.02)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.ticklabel_format(axis="x", style="plain")
    for axis in axes[-_COLUMNS:]:
        axis.set_xlabel("step")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _title(axis: Axes, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=12, fontweight="bold", pad=8)


def _draw(axis: Axes, panel: _Panel, lines: list[Line]) -> None:
    """Training figures smoothed, held-out ones as points, chance as a dashed line."""
    from matplotlib.ticker import PercentFormatter

    _title(axis, panel.title)
    drawn: list[float] = []
    for curve in panel.curves:
        steps, values = _series(lines, curve.name)
        held_out_steps, held_out = _series(lines, f"test_{curve.name}")
        means = _smoothed(values)
        if means:
            axis.plot(steps, means, color=curve.colour, linewidth=1.8, label=curve.label)
        if held_out:
            axis.plot(held_out_steps, held_out, "o" if means else "o-", color=curve.colour, markersize=8, linewidth=0.8,
                      markeredgecolor="white", zorder=3, label=None if means else curve.label)
        drawn += means[len(means) // 50:] + held_out  # the first few means are of too few steps to set the scale
    if not drawn:
        axis.text(0.5, 0.5, "not measured in this run", transform=axis.transAxes, ha="center", color="#777777")
        return
    chances = {chance_of(curve.name, lines) for curve in panel.curves} - {None}
    for chance in sorted(chance for chance in chances if chance is not None):
        text = f"{100 * chance:.3g} %" if panel.percent else f"{chance:.2f}"
        axis.axhline(chance, color="#777777", linestyle="--", linewidth=1.3, label=f"chance: {text}")
        drawn.append(chance)
    room = 0.08 * (max(drawn) - min(drawn)) or 0.1 * abs(drawn[0]) or 1.0
    axis.set_ylim(min(drawn) - room, max(drawn) + room)
    if panel.percent:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_ylim(bottom=max(0.0, min(drawn) - room))
    axis.legend(fontsize=9.5, framealpha=0.85, edgecolor="none", handlelength=1.6)


def _draw_rate(axis: Axes, lines: list[Line]) -> None:
    _title(axis, "learning rate")
    axis.plot(*_series(lines, "learning_rate"), color="#333333", linewidth=1.8)
    axis.set_ylim(bottom=0)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _draw_speed(axis: Axes, lines: list[Line]) -> None:
    _title(axis, "speed")
    speed, waiting = "#0072b2", "#d55e00"
    steps, values = _series(lines, "clips_per_s")
    axis.plot(steps, _smoothed(values), color=speed, linewidth=1.8)
    axis.set_ylabel("clips a second", color=speed)
    axis.set_ylim(bottom=0)
    other = axis.twinx()
    steps, values = _series(lines, "waiting_share")
    other.plot(steps, [100 * value for value in _smoothed(values)], color=waiting, linewidth=1.8)
    other.set_ylabel("time spent waiting for data, %", color=waiting)
    other.set_ylim(0, 100)
    other.spines[["top"]].set_visible(False)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: 0; } h2 { font-size: 1.15em; margin-top: 1.8em; }
table { border-collapse: collapse; } th, td { padding: .25em 1em .25em 0; border-bottom: 1px solid #ddd; }
th { text-align: left; font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
img { width: 100%; } .small { color: #666; font-size: .9em; }
"""


def _page(title: str, lines: list[Line], config: Config, picture: bytes) -> str:
    """One file that needs no other."""
    last = lines[-1]
    evaluated = next((line for line in reversed(lines) if any(name.startswith("test_") for name in line)), None)
    settings = _changed_settings(config)
    parts = [
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">', f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style></head><body>", f"<h1>{escape(title)}</h1>",
        f'<p class="small">step {last["step"]:,} of {config.training.steps:,}, epoch {last["epoch"]}, '
        f'{last.get("skipped_steps", 0)} skipped steps · avtrain {escape(__version__)}, '
        f"torch {escape(torch.__version__)}</p>",
        f"<h2>Held out, at step {evaluated['step']:,}</h2>" if evaluated else "<h2>Figures</h2>",
        _table(["figure", "held out", "training", "chance"], _figure_rows(lines, evaluated or {})),
        f'<p class="small">Training: the mean of the last {_window(len(lines))} steps, with dropout and augmentation. '
        "Chance: what a model that knows nothing would have, on the held-out clips where they were looked at.</p>",
        "<h2>Curves</h2>",
        f'<img alt="curves of the run" src="data:image/png;base64,{base64.b64encode(picture).decode()}">',
        "<h2>Settings that differ from the defaults</h2>",
        _table(["setting", "here", "default"], settings) if settings else "<p>none</p>", "</body></html>"]
    return "\n".join(parts) + "\n"


def _figure_rows(lines: list[Line], evaluated: Line) -> list[list[str]]:
    """One row a figure that is held out or learnt from, the total first."""
    names = [name.removeprefix("test_") for name in evaluated
             if name.startswith("test_") and not name.startswith("test_chance_")]
    names += [curve.name for panel in _PANELS for curve in panel.curves if curve.name != "learning_rate"
              and any(curve.name in line for line in lines)]
    rows = []
    for name in dict.fromkeys(names):
        _, values = _series(lines, name)
        recent = values[-_window(len(values)):]
        training = sum(recent) / len(recent) if recent else None
        rows.append([name, *(_number(name, value) for value in (
            evaluated.get(f"test_{name}"), training, chance_of(name, lines)))])
    return rows


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if "top1" in name or "accuracy" in name else f"{value:.4f}"


def _changed_settings(config: Config) -> list[list[str]]:
    here, default = config_to(config), config_to(Config())
    return [[f"{section}.{name}", json.dumps(value), json.dumps(default[section][name])]
            for section, values in here.items() for name, value in values.items()
            if value != default[section][name]]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f'<{tag}{" class=number" if number else ""}>{escape(cell)}</{tag}>'
                                for number, cell in enumerate(cells)) + "</tr>"

    return "\n".join(["<table>", line(heads, "th"), *(line(row, "td") for row in rows), "</table>"])
