"""The loop on a small problem: resuming is exact, bad steps are skipped, checkpoints are whole."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_training import CONFIG, Batch, Batches, Experiment, losses_of
from torch import nn

from avtrain.config import TrainingConfig
from avtrain.engine import Run, learning_rate
from avtrain.errors import AvtrainError
from avtrain.run_folder import RunFolder


def test_resuming_goes_on_to_the_same_losses_in_the_middle_of_an_epoch(tmp_path):
    whole = Experiment(tmp_path / "whole")
    whole.train()
    first = Experiment(tmp_path / "parts")
    first.train(max_steps=10)  # stops in the second epoch
    with (tmp_path / "parts/metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 5, "twi')  # killed while it wrote
    second = Experiment(tmp_path / "parts")
    torch.manual_seed(99)
    second.run.go_on(Batches())
    second.train()
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole") and len(losses_of(tmp_path / "whole")) == 20
    assert second.batches.made[0] == (1, 3)  # nothing that was seen is made again
    for one, other in zip(whole.network.state_dict().values(), second.network.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_resuming_after_a_kill_starts_at_the_last_whole_checkpoint(tmp_path):
    first = Experiment(tmp_path)
    first.train(max_steps=8)
    checkpoints = tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000006", "step-000008"]  # two are kept
    (checkpoints / "step-000009.part").mkdir()
    (checkpoints / "step-000010").mkdir()  # no training.pt: not whole
    second = Experiment(tmp_path)
    second.run.go_on(Batches())
    assert second.run.position.step == 8


def test_resuming_that_is_stopped_leaves_the_metrics_as_they_were(tmp_path, monkeypatch):
    Experiment(tmp_path).train(max_steps=8)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9}\n')  # after the last checkpoint: to be dropped
    before = (tmp_path / "metrics.jsonl").read_text()

    def stopped(path, text, **options):
        with path.open("w") as file:
            file.write(text[:len(text) // 2])
        raise KeyboardInterrupt

    second = Experiment(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", stopped)
        second.run.go_on(Batches())
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "metrics.jsonl", "tensorboard"]


def test_metrics_hold_what_is_promised(tmp_path):
    Experiment(tmp_path).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "twice", "learning_rate", "gradient_norm", "clips_per_s", "waiting_share", "memory_gib",
            "epoch", "step", "skipped_steps"} <= set(lines[0])
    assert 0.02 < lines[0]["memory_gib"] < 30 and "clips_per_s_process" not in lines[0]
    assert [line["step"] for line in lines if "held_out" in line] == [5, 10, 15, 20]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_lines_are_every_so_many_steps_and_hold_their_own_step(tmp_path):
    """Those lines are the ones that a run which logs every step has there; speed is that of all steps since."""
    Experiment(tmp_path / "every").train()
    Experiment(tmp_path / "fourth", replace(CONFIG, log_every=4)).train()
    lines = losses_of(tmp_path / "fourth")
    assert [step for step, *_ in lines] == [4, 5, 8, 10, 12, 15, 16, 20]  # and where it is evaluated
    assert lines == [line for line in losses_of(tmp_path / "every") if not line[0] % 4 or not line[0] % 5]


def test_a_bad_step_is_skipped_and_counted(tmp_path):
    experiment = Experiment(tmp_path, bad_steps=[4, 5])
    experiment.train(max_steps=3)
    before = {name: tensor.clone() for name, tensor in experiment.network.state_dict().items()}
    experiment.train(max_steps=5)
    for name, tensor in experiment.network.state_dict().items():  # BatchNorm's averages too
        assert torch.equal(before[name], tensor), name
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["skipped_steps"] == 2


def test_a_bad_step_is_skipped_by_a_run_of_an_earlier_version_too(tmp_path):
    """Its optimiser was not fused, and says so in the checkpoint."""
    Experiment(tmp_path).train(max_steps=3)
    path = tmp_path / "checkpoints" / "step-000003" / "training.pt"
    state = torch.load(path, weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = None
    torch.save(state, path)
    (path.parent / "checkpoint.json").unlink()
    experiment = Experiment(tmp_path, bad_steps=[1])
    assert experiment.run.go_on(Batches())
    experiment.train(max_steps=4)
    assert experiment.run.position.skipped_steps == 1
    for name, tensor in experiment.network.state_dict().items():
        assert torch.equal(tensor, state["modules"]["network"][name]), name


def test_an_optimiser_that_would_take_bad_steps_is_refused(tmp_path):
    network = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="fused"):
        Run(RunFolder(tmp_path), {"network": network}, torch.optim.Adam(network.parameters()), CONFIG,
            lambda folder: None)


def test_ten_bad_steps_in_a_row_stop_the_run_with_the_last_good_checkpoint(tmp_path):
    experiment = Experiment(tmp_path, bad_steps=range(5, 100))
    with pytest.raises(AvtrainError, match=r"step 14: .* 10 times in a row.*step-000003"):
        experiment.train()
    state = torch.load(tmp_path / "checkpoints" / "step-000003" / "training.pt", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in state["modules"]["network"].values())


def test_a_run_that_ends_with_losses_that_are_not_finite_has_a_checkpoint_or_fails(tmp_path):
    never = Experiment(tmp_path / "never", bad_steps=range(1, 100))
    with pytest.raises(AvtrainError, match=r"step 4: .* 4 times in a row.*none yet"):
        never.train(max_steps=4)
    assert not (tmp_path / "never" / "checkpoints").exists()
    skipped = Experiment(tmp_path / "skipped", bad_steps=[4, 5])
    skipped.train(max_steps=3)
    before = skipped.run.folder.load()["modules"]["network"]
    skipped.train(max_steps=5)
    assert skipped.run.folder.last_checkpoint().name == "step-000005" and skipped.run.bad_steps == 2
    after = skipped.run.folder.load()["modules"]["network"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [line["step"] for line in skipped.run.folder.lines() if "held_out" in line] == [3, 5]
    again = Experiment(tmp_path / "skipped")
    again.run.go_on(Batches())
    again.train(max_steps=6)
    assert again.run.position.skipped_steps == 2 and again.run.bad_steps == 0


def test_a_checkpoint_that_was_due_at_a_bad_step_comes_after_the_next_good_one(tmp_path):
    experiment = Experiment(tmp_path, replace(CONFIG, evaluate_every=50, log_every=50), bad_steps=[3, 4])
    saved, save = [], experiment.run.save
    experiment.run.save = lambda due=None: saved.append(experiment.run.position.step) or save(due)
    experiment.train(max_steps=7)
    assert saved == [5, 6, 7]


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    """Two parts, whose shares of the mean add up: the same as at once, without batch statistics, dropout and noise."""
    torch.manual_seed(0)
    results, figures = [], []
    for parts in (1, 2):
        torch.manual_seed(0)
        network = nn.Linear(8, 1)
        optimizer = torch.optim.SGD(network.parameters(), fused=True)
        run = Run(RunFolder(tmp_path / str(parts)), {"network": network}, optimizer,
                  replace(CONFIG, steps=1), lambda folder: None)

        class Halves(Batches):
            def starting_at(self, first, parts=parts):
                inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
                for part in inputs.chunk(parts):
                    yield Batch(["k"] * len(part), part)

        halves = Halves()
        halves.parts = parts

        def step(batch, part, network=network):
            loss = network(batch.inputs).square().sum() / 4
            return loss, {"twice": 2 * loss.detach()}

        run.train(step, halves, nullcontext, dict)
        results.append(network.weight.detach().clone())
        [(_, loss, twice)] = losses_of(tmp_path / str(parts))
        figures.append((loss, twice))
    assert torch.allclose(results[0], results[1], atol=1e-7)
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 100.0])
def test_gradients_are_scaled_down_to_the_norm_that_is_set(tmp_path, clip_norm):
    network = nn.Linear(8, 1, bias=False)
    before = network.weight.detach().clone()
    run = Run(RunFolder(tmp_path), {"network": network}, torch.optim.SGD(network.parameters(), lr=1.0, fused=True),
              replace(CONFIG, steps=1, warmup=0.0, learning_rate=1.0, clip_norm=clip_norm), lambda folder: None)
    run.train(lambda batch, part: (3 * network.weight.sum(), {}), Batches(), nullcontext, dict)
    norm = 3 * 8**0.5
    wanted = min(norm, clip_norm or norm)
    assert float((network.weight.detach() - before).norm()) == pytest.approx(wanted, rel=1e-4)
    [line] = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["gradient_norm"] == pytest.approx(norm, rel=1e-4)  # as it was before


def test_learning_rate_rises_and_falls():
    config = TrainingConfig(steps=1000, learning_rate=1e-3, warmup=0.1)
    rates = [learning_rate(step, config) for step in range(1000)]
    assert max(rates) == pytest.approx(1e-3) and 90 <= rates.index(max(rates)) <= 101
    assert rates[0] < 2e-5 and rates[-1] < 1e-8
    assert rates[550] == pytest.approx(5e-4) and all(math.isfinite(rate) for rate in rates)


def test_without_a_checkpoint_a_run_begins_and_one_of_another_model_is_refused(tmp_path):
    assert not Experiment(tmp_path).run.go_on(Batches())
    Experiment(tmp_path).train(max_steps=1)
    network = nn.Linear(3, 3)
    other = Run(RunFolder(tmp_path), {"network": network}, torch.optim.Adam(network.parameters(), fused=True), CONFIG,
                lambda folder: None)
    with pytest.raises(AvtrainError, match=r"other settings: .* --force begins anew"):
        other.go_on(Batches())


def test_a_run_that_is_there_already_does_nothing(tmp_path):
    Experiment(tmp_path).train(max_steps=4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = Experiment(tmp_path)
    assert again.run.go_on(Batches())
    again.train(max_steps=4)
    assert again.steps == 0 and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_speed_is_told_as_a_share_of_the_peak_where_that_is_known(tmp_path):
    known = Experiment(tmp_path, mfu_of_clip_per_s=0.01)
    known.train(max_steps=2)
    lines = known.run.folder.lines()
    assert all(line["mfu"] == pytest.approx(0.01 * line["clips_per_s"]) for line in lines)


def test_a_position_of_an_earlier_version_is_counted_in_clips(tmp_path):
    Experiment(tmp_path).train(max_steps=3)
    for file in tmp_path.rglob("checkpoint.json"):
        file.unlink()
    path = tmp_path / "checkpoints" / "step-000003" / "training.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"position": {"step": 3, "epoch": 2, "batch": 3, "skipped_steps": 1}}, path)
    again = Experiment(tmp_path)
    assert again.run.go_on(Batches())
    assert vars(again.run.position) == {"step": 3, "clips": 2 * 28 + 3 * 4, "skipped_steps": 1}
