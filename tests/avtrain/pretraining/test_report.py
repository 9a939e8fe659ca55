"""The report of a run: a picture and a page made from its folder alone."""

import base64
import html
import json
import math
import os
import re
import struct
from html.parser import HTMLParser

import pytest
import torch
from click.testing import CliRunner

from avtrain.cli import main
from avtrain.config import config_to, read_config
from avtrain.errors import AvtrainError
from avtrain.pretraining.curves import PICTURE_PIXELS, chance_of
from avtrain.pretraining.report import held_out_text, write_report

# Three steps of four, the last one evaluated; a batch of two clips may have nothing masked.
LINES = [
    {"step": 1, "epoch": 0, "loss": 12.0, "mep_visual": 3.1, "pair": 0.8, "pair_accuracy": 0.5, "learning_rate": 1e-3,
     "clips_per_s": 9.0, "waiting_share": 0.3, "skipped_steps": 0},
    {"step": 2, "epoch": 0, "loss": 11.0, "mep_visual": 2.9, "pair": 0.7, "pair_accuracy": 0.75, "learning_rate": 5e-4,
     "clips_per_s": 19.0, "waiting_share": 0.1, "skipped_steps": 1},
    {"step": 3, "epoch": 1, "loss": 10.5, "pair": 0.6, "pair_accuracy": 1.0, "learning_rate": 1e-5,
     "clips_per_s": 19.0, "waiting_share": 0.1, "skipped_steps": 1, "test_loss": 11.5, "test_mep_visual": 2.5,
     "test_pair_accuracy": 0.625, "test_masked_top1_audio": 0.0317, "test_chance_masked_top1_audio": 0.025,
     "test_chance_mep_visual": math.log(17), "test_chance_pair_accuracy": 0.5}]


@pytest.fixture
def run(tmp_path):
    """The folder of a run that was stopped after step 3."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = read_config("tiny", ["training.steps=4", "model.rank=8", "objectives.negatives=16"])
    (folder / "config.json").write_text(json.dumps(config_to(config)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return folder


def _cells(page):
    return [[html.unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)]
            for row in re.findall(r"<tr>(.*?)</tr>", page)]


def _png_size(content):
    assert content.startswith(b"\x89PNG")
    return struct.unpack(">II", content[16:24])


def test_the_page_holds_the_figures_beside_chance_the_settings_and_the_curves(run):
    done = CliRunner().invoke(main, ["report", str(run)])
    assert done.exit_code == 0 and str(run / "report.html") in done.stdout
    page = (run / "report.html").read_text()
    rows = {cells[0]: cells[1:] for cells in _cells(page)}
    assert rows["loss"][:2] == ["11.5000", "10.5000"]
    assert rows["mep_visual"] == ["2.5000", "2.9000", f"{math.log(17):.4f}"]
    assert rows["pair_accuracy"] == ["62.5 %", "100.0 %", "50.0 %"]
    assert rows["masked_top1_audio"] == ["3.2 %", "–", "2.5 %"]
    assert not [name for name in rows if "chance_" in name]
    assert rows["model.rank"] == ["8", "128"] and "data.segments" not in rows
    assert "step 3 of 4" in page and "Held out, at step 3" in page and f"torch {torch.__version__}" in page
    picture = (run / "report.png").read_bytes()
    assert _png_size(picture) == PICTURE_PIXELS
    assert base64.b64decode(re.search(r'src="data:image/png;base64,([^"]*)"', page).group(1)) == picture
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing outside the file
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_odd_runs_are_drawn_too(tmp_path):
    """Killed while writing, one step long, never evaluated, with a loss that was not finite."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = read_config("tiny", ["model.fusion=late", "objectives.sampling=random"])
    (folder / "config.json").write_text(json.dumps(config_to(config)))
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "epoch": 0, "loss": NaN, "mep_audio": 4.0, "learning_rate": 0.1, "clips_per_s": 2.0, '
        '"waiting_share": 0.5}\n{"step": 2, "lo')
    page, picture = write_report(folder)
    text = page.read_text()
    rows = {cells[0]: cells[1:] for cells in _cells(text)}
    assert rows["mep_audio"][1] == "4.0000" and rows["loss"][1] == "–" and rows["model.fusion"][0] == '"late"'
    assert "<h2>Figures</h2>" in text and "step 1 of" in text and "0 skipped steps" in text
    assert _png_size(picture.read_bytes()) == PICTURE_PIXELS


class _Tags(HTMLParser):
    """The tags of a page, with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, [name for name, _ in attributes]))

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("name", [
    "<script>alert(1)<", "</title><img src=x onerror=alert(1)>", "\" onload=\"x", "{{ 7 * 7 }}{% raw %}",
    "a & b &lt; c", os.fsdecode(b"not utf-8 \xff")])
def test_names_of_strangers_are_text_on_the_page(run, monkeypatch, name):
    """Of the run's folder, and of figures in its metrics."""
    monkeypatch.setattr("avtrain.pretraining.report.picture_of", lambda lines: b"")
    plain = _Tags(write_report(run)[0].read_text())
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("mep_visual", json.dumps(name)[1:-1]))
    folder = run.rename(run.with_name(name.replace("/", "")))
    page = _Tags(write_report(folder)[0].read_text())
    assert page.tags == plain.tags and "script" not in dict(page.tags)
    for shown in (name, name.replace("/", "")):
        assert shown.encode(errors="backslashreplace").decode() in page.text


def test_what_is_no_run_is_said(run, tmp_path):
    done = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert done.exit_code == 1 and f"{tmp_path} has no config.json" in done.stderr
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(AvtrainError, match="not made a step"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{nonsense}\n")
    with pytest.raises(AvtrainError, match="damaged"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cant_be_written_is_named_as_it_would_be_called(run):
    (run / "report.html").mkdir()
    done = CliRunner().invoke(main, ["report", str(run)])
    assert done.exit_code == 1 and done.stderr == f"Error: {run}/report.html: Is a directory\n"
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_chance_is_what_the_run_recorded():
    lines = [{"step": step, "loss": 1.0, "chance_loss": 2.0, "chance_top1_audio": 1 / count} for step, count in
             ((1, 65), (2, 31))]
    assert chance_of("loss", lines) == 2.0 and chance_of("top1_audio", lines) == 1 / 31  # of the last 5 %
    lines.append({"step": 3, "loss": 1.0, "test_loss": 1.0, "test_chance_loss": 1.5})
    assert chance_of("loss", lines) == 1.5
    assert chance_of("pair_accuracy", lines) is None and chance_of("clips_per_s", lines) is None


def test_what_was_found_on_held_out_clips_stands_beside_its_own_chance():
    figures = {"step": 9, "test_loss": 3.0, "test_chance_loss": 4.0, "test_pair_accuracy": 0.625,
               "test_chance_pair_accuracy": 0.55, "test_masked_top1_visual": 0.1, "test_masked_top1_audio": 0.25,
               "test_masked_top1_multimodal_audio": 0.2, "test_chance_masked_top1_visual": 0.01,
               "test_chance_masked_top1_audio": 1 / 30, "test_chance_masked_top1_multimodal_audio": 1 / 30}
    assert held_out_text(figures) == [
        "held-out pair accuracy 62.5 % (chance 55 %)",
        "held-out masked top-1 of 100 candidates, visual: 10.0 % (chance 1 %)",
        "held-out masked top-1 of 30 candidates, audio: 25.0 % (chance 3.33 %)",
        "held-out masked top-1 of 30 candidates, multimodal Transformer, audio: 20.0 % (chance 3.33 %)"]
    assert held_out_text({}) == []
