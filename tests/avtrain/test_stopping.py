"""Signals and time, on the engine's small problem; where nothing disturbs, and after going on, losses are the same."""

import json
import os
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from small_training import CONFIG, Batch, Batches, Experiment, losses_of
from torch import nn

from avtrain.engine import Run
from avtrain.errors import AvtrainError, Stopped
from avtrain.finite_steps import LossScale
from avtrain.run_folder import RunFolder
from avtrain.stopping import Stopping, Took


def _send(number, after_s=0.3):
    threading.Timer(after_s, os.kill, (os.getpid(), number)).start()


class _Slow(Batches):
    """One batch takes a minute, or fails."""

    def __init__(self, at, befalls=lambda: time.sleep(60)):
        super().__init__()
        self.at, self.befalls = at, befalls

    def starting_at(self, first):
        for number, one in enumerate(super().starting_at(first)):
            if number == self.at:
                self.befalls()
            yield one


def _fails():
    raise AvtrainError("broken data")


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("befalls", [lambda: time.sleep(60), _fails])
def test_a_step_that_waits_for_data_is_undone_and_gone_on_with(tmp_path, monkeypatch, parts, befalls):
    """With three parts, in its third: masks of dropout were drawn and BatchNorm's averages had moved."""
    monkeypatch.setattr(Batches, "parts", parts)
    monkeypatch.setattr(Batches, "batch_size", 4 * parts)
    config = replace(CONFIG, save_every=50)
    Experiment(tmp_path / "whole", config).train()
    first = Experiment(tmp_path / "parts", config)
    first.batches = _Slow(8 * parts - 1, befalls)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    began = time.monotonic()
    if befalls is _fails:
        with pytest.raises(AvtrainError, match="broken data"):
            first.train()
    else:
        _send(signal.SIGUSR1, 1.0)
        with pytest.raises(Stopped) as stopped:
            first.train()
        assert (stopped.value.step, stopped.value.exit_code) == (7, 0)
        assert str(stopped.value).startswith("stopped by SIGUSR1 at step 7: the same command goes on from ")
    assert time.monotonic() - began < 20 and first.run.folder.last_step() == 7
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    second = Experiment(tmp_path / "parts", config)
    second.run.go_on(Batches())
    second.train()
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    weights = [RunFolder(tmp_path / name).load()["modules"]["network"] for name in ("whole", "parts")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_no_checkpoint_before_an_error_of_data_where_losses_are_not_finite(tmp_path):
    experiment = Experiment(tmp_path, bad_steps=[8])
    experiment.batches = _Slow(8, _fails)
    with pytest.raises(AvtrainError, match="broken data"):
        experiment.train()
    assert experiment.run.folder.last_step() == 6


def test_a_signal_in_a_step_lets_it_end(tmp_path):
    experiment = Experiment(tmp_path)
    step = experiment.step

    def told(batch, part):
        if experiment.steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batch, part)

    experiment.step = told
    with pytest.raises(Stopped) as stopped:
        experiment.train()
    assert (stopped.value.step, stopped.value.exit_code) == (4, 143) and experiment.run.folder.last_step() == 4


def test_a_signal_in_an_evaluation_leaves_it_due(tmp_path):
    Experiment(tmp_path / "whole").train()
    experiment, began = Experiment(tmp_path / "run"), time.monotonic()
    _send(signal.SIGINT, 1.0)
    with pytest.raises(Stopped) as stopped:
        experiment.run.train(experiment.step, experiment.batches, nullcontext, lambda: time.sleep(60))
    assert (stopped.value.step, stopped.value.exit_code) == (5, 130) and time.monotonic() - began < 20
    again = Experiment(tmp_path / "run")
    again.run.go_on(Batches())
    again.train()
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")
    assert [line["step"] for line in again.run.folder.lines() if "held_out" in line] == [5, 10, 15, 20]


def test_ctrl_c_for_the_second_time_ends_at_once():
    with pytest.raises(KeyboardInterrupt), Stopping(None) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.asked == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stopping(None) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert stop.asked is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_works_beside_the_main_thread(tmp_path):
    experiment, before = Experiment(tmp_path), signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=experiment.train)
    thread.start()
    thread.join()
    assert experiment.run.folder.last_step() == 20 and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_evaluation_and_checkpoint_are_done_when_the_time_is_up(tmp_path):
    config = replace(CONFIG, steps=10**6, log_every=10**5, evaluate_every=10**6, save_every=10**6)
    for number in range(2):  # the second call knows how long an evaluation took
        experiment = Experiment(tmp_path, config)
        assert experiment.run.go_on(Batches()) == bool(number)
        until = time.monotonic() + 4
        experiment.run.train(experiment.step, experiment.batches, nullcontext,
                             lambda: time.sleep(1.5) or {"held_out": 1.0}, until=until)
        assert time.monotonic() < until + (0 if number else 4), time.monotonic() - until
        line = experiment.run.folder.lines()[-1]
        assert line["held_out"] == 1.0 and line["step"] == experiment.run.folder.last_step()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] > 1


def test_how_long_the_end_takes_is_judged_by_the_last_time():
    took = Took("save", "evaluation")
    now = time.monotonic()
    with Stopping(now + 100) as stop:
        assert not stop.is_time(took)  # a twentieth is kept for each
        took.last = {"save": 10.0, "evaluation": 60.0}
        assert not stop.is_time(took)
        took.step_s = 20.0
        assert stop.is_time(took)
    with Stopping(None) as stop:
        assert not stop.is_time(took)


def test_the_scale_of_losses_is_halved_doubled_and_bounded():
    scale, one = LossScale(torch.device("cpu")), torch.ones(())
    assert scale.scaled(one) == 2**12
    for _ in range(1999):
        scale.after(one)
    scale.after(one / 0)  # begins to count anew
    for _ in range(1999):
        scale.after(one)
    assert scale.scaled(one) == 2**11
    state = {name: tensor.clone() for name, tensor in scale.state().items()}
    scale.after(one)
    assert scale.scaled(one) == 2**12
    again = LossScale(torch.device("cpu"))
    again.load(state)
    again.after(one)
    assert again.scaled(one) == 2**12
    for _ in range(50):
        scale.after(one * float("nan"))
    assert scale.scaled(one) == 1
    for _ in range(2000 * 30):
        scale.after(one)
    assert scale.scaled(one) == 2**24


def _scaled(folder, scaled, steps=6, too_large=()):
    """Training in float32, where a scale that is a power of two rounds nothing."""
    torch.manual_seed(0)
    network = nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(network.parameters(), 0.01, fused=True)
    run = Run(RunFolder(folder), {"network": network}, optimizer, replace(CONFIG, steps=steps), lambda to: None, scaled)
    run.go_on(Batches())

    def step(batch: Batch, part):
        loss = network(batch.inputs).square().mean()
        return loss * (1e38 if run.position.step in too_large else 1), {}

    run.train(step, Batches(), nullcontext, None)
    return network.weight.detach().clone(), run


def test_scaled_losses_give_the_same_steps(tmp_path):
    plain, _ = _scaled(tmp_path / "plain", False)
    assert torch.equal(plain, _scaled(tmp_path / "scaled", True)[0])
    norms = [[line["gradient_norm"] for line in RunFolder(tmp_path / name).lines()] for name in ("plain", "scaled")]
    assert norms[0] == norms[1]


def test_gradients_that_are_too_large_skip_a_step_halve_the_scale_and_are_gone_on_with(tmp_path):
    _, run = _scaled(tmp_path / "run", True, 6, too_large=[1, 2])
    state = run.folder.load()
    assert state["loss_scale"]["scale"] == 2**10 and run.position.skipped_steps == 2 and run.bad_steps == 0
    again = Run(RunFolder(tmp_path / "run"), run.modules, torch.optim.AdamW(
        run.modules["network"].parameters(), 0.01, fused=True), CONFIG, lambda to: None, True)
    assert again.go_on(Batches())
    again.save()
    assert again.folder.load()["loss_scale"]["scale"] == 2**10
