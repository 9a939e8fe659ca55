"""Figures of a run on Weights & Biases: those of its metrics, in one run there however often it goes on."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
from small_eval import invoke
from small_pretrain import pretrained, started
from small_training import Batches, Experiment

from avtrain.errors import AvtrainError


class _Error(Exception):
    pass


class _Wandb:
    """Stands in for the package: keeps what it is told."""

    Error, __spec__ = _Error, "installed"

    def __init__(self):
        self.begun, self.logged, self.ended, self.error = [], [], [], None

    def Settings(self, **options):
        return options

    def init(self, **options):
        if self.error:
            raise self.error
        self.begun.append(options)
        return SimpleNamespace(define_metric=lambda *rest, **options: None, log=self.logged.append,
                               finish=lambda exit_code: self.ended.append(exit_code))


@pytest.fixture
def wandb(monkeypatch):
    module = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_it_gets_every_line_of_the_metrics_in_one_run(tmp_path, wandb):
    Experiment(tmp_path, wandb="demo").train(max_steps=4)
    again = Experiment(tmp_path, wandb="demo")
    again.run.go_on(Batches())
    again.train(max_steps=7)
    lines = again.run.folder.lines()
    assert [line["step"] for line in wandb.logged] == [line["step"] for line in lines] == [*range(1, 8)]
    assert wandb.logged[4] == pytest.approx(lines[4])
    assert {(one["id"], one["project"], one["resume"]) for one in wandb.begun} == {
        (again.run.folder.wandb_id(), "demo", "allow")}
    assert len(wandb.begun) == 2 and wandb.ended == [0, 0]
    again.run.folder.clear()
    assert not (tmp_path / "wandb_id.txt").exists()


def test_without_it_nothing_is_asked_for_and_what_fails_is_said_in_a_line(tmp_path, wandb):
    Experiment(tmp_path / "without").train(max_steps=1)
    assert not wandb.begun and not (tmp_path / "without" / "wandb_id.txt").exists()
    wandb.error = _Error("api_key not configured\nmore")
    with pytest.raises(AvtrainError, match="^--wandb demo: api_key not configured; WANDB_MODE=offline"):
        Experiment(tmp_path / "fails", wandb="demo").train(max_steps=1)


def test_where_it_is_not_installed_the_extra_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    for command in (("pretrain",), ("eval", "--task", "ucf101")):
        done = invoke(*command, "--wandb", "demo", "--out", tmp_path / "run")
        assert done.exit_code == 1 and "pip install 'avprep-avtrain[wandb]'" in done.output
        assert len(done.output.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_what_logs_nothing_is_refused(tmp_path, wandb):
    done = invoke("eval", "--task", "ucf101", "--init", "random", "--preset", "sound", "--modality", "audio",
                  "--protocol", "knn", "--wandb", "demo", "--out", tmp_path / "run", "--device", "cpu")
    assert done.exit_code == 1
    assert done.output == "Error: --wandb demo: goes with --protocol finetune; knn logs nothing\n"


@pytest.mark.slow
def test_offline_the_package_itself_keeps_the_figures_in_the_runs_folder(demo_shards, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    out = tmp_path / "run"
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (2, 4):
        with started(demo_shards, out, "--max-steps", steps, "--wandb", "demo") as process:
            _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    kept = [path.name for path in (out / "wandb").glob("offline-run-*")]
    name = (out / "wandb_id.txt").read_text().strip()
    assert len(kept) == 2 and all(one.endswith(f"-{name}") for one in kept)
    content = b"".join(path.read_bytes() for path in (out / "wandb").glob("offline-run-*/*.wandb"))
    assert b"masked_top1" in content or b"mep_audio" in content
    assert pretrained(demo_shards, out, "--force", "--max-steps", 1).exit_code == 0
    assert not (out / "wandb").exists() and not (out / "wandb_id.txt").exists()
