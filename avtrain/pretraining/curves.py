"""The curves of a run: which figures are drawn together, how they are smoothed, and the picture."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from avtrain.pretraining.held_out import CANDIDATES
from avtrain.run_folder import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_PIXELS = (1600, 1200)
_DPI = 100
_ROWS, _COLUMNS = 3, 3
_COLOURS = {"visual": "#0072b2", "audio": "#d55e00", "multimodal": "#009e73"}
_LAST_SHARE = 0.05  # curves are means over this share of a run's steps, and so is the page's training figure


@dataclass(frozen=True)
class Curve:
    """One line of a panel: a figure's name in metrics.jsonl, how it is called, its colour."""

    name: str
    label: str
    colour: str = "#333333"


@dataclass(frozen=True)
class Panel:
    """What is drawn in one place, under a title."""

    title: str
    curves: list[Curve]
    percent: bool = False


PANELS = [
    Panel("total loss", [Curve("loss", "all parts, weighted")]),
    Panel("masked prediction in one modality, loss", [
        Curve("mep_visual", "visual", _COLOURS["visual"]), Curve("mep_audio", "audio", _COLOURS["audio"])]),
    Panel("masked prediction in both, loss", [
        Curve("mep_multimodal", "visual + audio", _COLOURS["multimodal"])]),
    Panel("pair prediction, loss", [Curve("pair", "same video or not", "#cc79a7")]),
    Panel("pair accuracy", [Curve("pair_accuracy", "same video or not", "#cc79a7")], percent=True),
    Panel("masked top-1 among the batch's negatives", [
        Curve("top1_visual", "visual", _COLOURS["visual"]), Curve("top1_audio", "audio", _COLOURS["audio"]),
        Curve("top1_multimodal_visual", "multimodal, visual", "#56b4e9"),
        Curve("top1_multimodal_audio", "multimodal, audio", "#e69f00")], percent=True),
    Panel(f"held out: masked top-1 of up to {CANDIDATES} random ones", [
        Curve("masked_top1_visual", "visual", _COLOURS["visual"]),
        Curve("masked_top1_audio", "audio", _COLOURS["audio"]),
        Curve("masked_top1_multimodal_visual", "multimodal, visual", "#56b4e9"),
        Curve("masked_top1_multimodal_audio", "multimodal, audio", "#e69f00")], percent=True),
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
    _, held_out = series(lines, f"test_chance_{name}")
    _, training = series(lines, f"chance_{name}")
    return held_out[-1] if held_out else recent_mean(training)


def series(lines: list[Line], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a figure, where it was measured and finite."""
    points = [(line["step"], line[name]) for line in lines if name in line and math.isfinite(line[name])]
    return [step for step, _ in points], [value for _, value in points]


def steps_averaged(count: int) -> int:
    """How many of a run's steps a mean is taken over."""
    return max(1, round(_LAST_SHARE * count))


def recent_mean(values: list[float]) -> float | None:
    """The mean of the last ones; None if there are none."""
    recent = values[-steps_averaged(len(values)):]
    return sum(recent) / len(recent) if recent else None


def _smoothed(values: list[float]) -> list[float]:
    """The mean of each value and those before it, over a window; at the start over what there is."""
    window, total, means = steps_averaged(len(values)), 0.0, []
    for number, value in enumerate(values):
        total += value - (values[number - window] if number >= window else 0.0)
        means.append(total / min(number + 1, window))
    return means


def picture_of(lines: list[Line]) -> bytes:
    """The curves, as a PNG of `PICTURE_PIXELS`."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    width, height = PICTURE_PIXELS
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI,
                    layout=ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.14))
    figure.suptitle(f"lines: training, each the mean of {steps_averaged(len(lines))} steps   ·   points: held-out clips"
                    "   ·   dashed: chance", fontsize=11, color="#555555")
    axes = figure.subplots(_ROWS, _COLUMNS).flatten()
    for axis, panel in zip(axes, PANELS, strict=False):
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


def _draw(axis: Axes, panel: Panel, lines: list[Line]) -> None:
    """Training figures smoothed, held-out ones as points, chance as a dashed line."""
    from matplotlib.ticker import PercentFormatter

    _title(axis, panel.title)
    drawn: list[float] = []
    for curve in panel.curves:
        steps, values = series(lines, curve.name)
        held_out_steps, held_out = series(lines, f"test_{curve.name}")
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
    axis.plot(*series(lines, "learning_rate"), color="#333333", linewidth=1.8)
    axis.set_ylim(bottom=0)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _draw_speed(axis: Axes, lines: list[Line]) -> None:
    _title(axis, "speed")
    speed, waiting = "#0072b2", "#d55e00"
    steps, values = series(lines, "clips_per_s")
    axis.plot(steps, _smoothed(values), color=speed, linewidth=1.8)
    axis.set_ylabel("clips a second", color=speed)
    axis.set_ylim(bottom=0)
    other = axis.twinx()
    steps, values = series(lines, "waiting_share")
    other.plot(steps, [100 * value for value in _smoothed(values)], color=waiting, linewidth=1.8)
    other.set_ylabel("time spent waiting for data, %", color=waiting)
    other.set_ylim(0, 100)
    other.spines[["top"]].set_visible(False)
