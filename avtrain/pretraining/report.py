"""What a run came to, from its folder alone: curves as a picture, and one page with the figures beside chance."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from avtrain import __version__
from avtrain.config import Config, config_from, config_to
from avtrain.errors import AvtrainError
from avtrain.files import written_whole
from avtrain.pretraining.curves import PANELS, chance_of, picture_of, recent_mean, series, steps_averaged
from avtrain.run_folder import CONFIG, METRICS, Line, RunFolder, read_settings

PAGE = "report.html"
_TEMPLATE = "report.html.jinja"


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
    picture = picture_of(lines)
    page = _page(folder.resolve().name, lines, config, picture)
    written = []
    for name, content in ((PAGE, page.encode(errors="backslashreplace")), ("report.png", picture)):
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


def _page(title: str, lines: list[Line], config: Config, picture: bytes) -> str:
    """One file that needs no other."""
    evaluated = next((line for line in reversed(lines) if any(name.startswith("test_") for name in line)), {})
    return _template().render(
        title=title, last=lines[-1], steps=config.training.steps, avtrain_version=__version__,
        torch_version=torch.__version__, evaluated=evaluated, figures=_figure_rows(lines, evaluated),
        steps_averaged=steps_averaged(len(lines)), picture=base64.b64encode(picture).decode(),
        settings=_changed_settings(config))


def _template() -> Template:
    """That of the page. What it is filled with is escaped, whatever it is; a value that is missing is an error."""
    beside = FileSystemLoader(Path(__file__).parent)
    return Environment(loader=beside, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                       keep_trailing_newline=True).get_template(_TEMPLATE)


def _figure_rows(lines: list[Line], evaluated: Line) -> list[list[str]]:
    """One row a figure that is held out or learnt from, the total first: its name, held out, in training, by chance."""
    names = [name.removeprefix("test_") for name in evaluated
             if name.startswith("test_") and not name.startswith("test_chance_")]
    names += [curve.name for panel in PANELS for curve in panel.curves if any(curve.name in line for line in lines)]
    return [[name, *(_number(name, value) for value in (
        evaluated.get(f"test_{name}"), recent_mean(series(lines, name)[1]), chance_of(name, lines)))]
            for name in dict.fromkeys(names)]


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if "top1" in name or "accuracy" in name else f"{value:.4f}"


def _changed_settings(config: Config) -> list[list[str]]:
    """Name, value and default of each that is another."""
    here, default = config_to(config), config_to(Config())
    return [[f"{section}.{name}", json.dumps(value), json.dumps(default[section][name])]
            for section, values in here.items() for name, value in values.items()
            if value != default[section][name]]
