"""The published protocols, number by number, and that training does what they say: against torch's own schedules."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from small_eval import NETWORK, QUICK, predictions_of, run_eval, settings
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from avtrain.config import read_config
from avtrain.data.shards import open_folders
from avtrain.errors import AvtrainError
from avtrain.models.avbert import AVBert
from avtrain.runtime import Runtime
from avtrain.transfer.feature_file import mean_and_std
from avtrain.transfer.finetune import Classifier, predict, task_loss
from avtrain.transfer.probes import linear_scores
from avtrain.transfer.protocols import protocol_for
from avtrain.transfer.tasks import TASKS

# As the authors' release has them: clips of a video in training and in the test, crops, and the rest.
PUBLISHED = {
    "ucf101": {"epochs": 20, "batch_size": 32, "head_rate": 0.03, "backbone_rate": 1e-4, "weight_decay": 5e-6,
               "adam_eps": 1e-6, "dropout": 0.5, "loss": "cross_entropy", "sequence": False, "warmup": 0.0,
               "train_views": 10, "test_views": 10, "test_crops": 3, "test_whole": True,
               "random_start": False, "label_smoothing": 0.0},
    "esc50": {"epochs": 300, "batch_size": 128, "head_rate": 0.003, "weight_decay": 5e-6, "dropout": 0.1,
              "loss": "hinge", "train_views": 10, "test_views": 10, "standardize": False, "label_smoothing": 0.0},
    "kinetics-sounds": {"epochs": 20, "batch_size": 5, "head_rate": 1e-3, "backbone_rate": 1e-4, "dropout": 0.5,
                        "loss": "cross_entropy", "sequence": True, "warmup": 0.0, "train_views": 10,
                        "test_views": 10, "test_crops": 3, "test_whole": True, "random_start": False,
                        "label_smoothing": 0.0}}


@pytest.mark.parametrize("task", PUBLISHED)
def test_the_default_is_the_published_protocol(task):
    protocol = protocol_for(task, TASKS[task].protocol, "published")
    assert {name: getattr(protocol, name) for name in PUBLISHED[task]} == PUBLISHED[task]
    assert (TASKS[task].protocol, TASKS[task].modality) == {
        "ucf101": ("finetune", "visual"), "esc50": ("linear", "audio"), "kinetics-sounds": ("finetune", "both")}[task]


@pytest.fixture
def adam(monkeypatch):
    """Adam that remembers itself, and the rate of every group at every step."""
    made = []

    class Remembering(torch.optim.Adam):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.rates = []
            made.append(self)

        def step(self, *arguments, **options):
            self.rates.append([group["lr"] for group in self.param_groups])
            return super().step(*arguments, **options)

    monkeypatch.setattr(torch.optim, "Adam", Remembering)
    return made


def _schedule(scheduler, base, steps):
    """The rates of torch's own scheduler."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], base)
    schedule = scheduler(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_finetuning_one_cnn_trains_that_and_a_head_at_rates_of_their_own(tree, tmp_path, adam):
    done = run_eval(tree, tmp_path, "ucf101", *settings([*QUICK, "transfer.epochs=3"]), "--split", "2")
    assert done.exit_code == 0, done.output
    [optimizer] = adam
    steps = len(optimizer.rates)
    assert steps == 9  # 7 videos, 2 clips of each, batches of 4 that are full, 3 epochs
    expected = [_schedule(lambda one: torch.optim.lr_scheduler.CosineAnnealingLR(one, steps), base, steps)
                for base in (1e-4, 1e-4, 0.03, 0.03)]
    torch.testing.assert_close(torch.tensor(optimizer.rates), torch.tensor(expected).T)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-6, 0, 5e-6, 0]
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}
    model = AVBert(read_config("tiny", NETWORK).model)
    norms = [module for module in model.visual_cnn.modules() if isinstance(module, _BatchNorm)]
    cnn = sum(parameter.numel() for parameter in model.visual_cnn.parameters())
    of_norms = sum(parameter.numel() for norm in norms for parameter in norm.parameters())
    sizes = [sum(parameter.numel() for parameter in group["params"]) for group in optimizer.param_groups]
    assert sizes == [cnn - of_norms, of_norms, 3 * model.visual_cnn.outputs + 3, 0]


def test_a_linear_classifiers_rate_falls_in_a_line(tree, tmp_path, adam):
    done = run_eval(tree, tmp_path, "kinetics-sounds", "--protocol", "linear", *settings([*QUICK, "transfer.epochs=5"]))
    assert done.exit_code == 0, done.output
    [optimizer] = adam
    steps = len(optimizer.rates)
    assert steps == 25  # 9 videos, 2 clips of each, batches of 4, 5 epochs
    expected = _schedule(lambda one: torch.optim.lr_scheduler.LinearLR(one, 1.0, 0.0, steps), 0.003, steps)
    torch.testing.assert_close(torch.tensor(optimizer.rates)[:, 0], torch.tensor(expected))
    assert optimizer.param_groups[0]["weight_decay"] == 5e-6


def test_a_probe_learns_from_what_is_not_held_out_scaled_by_that_alone(tree, tmp_path, monkeypatch):
    seen = []

    def spy(train, targets, tests, *rest):
        seen.append((train, targets(np.arange(len(train))), tests))
        return linear_scores(train, targets, tests, *rest)

    monkeypatch.setattr("avtrain.transfer.evaluate.linear_scores", spy)
    done = run_eval(tree, tmp_path, "kinetics-sounds", "--protocol", "linear", "--validation", "0.3", *settings(QUICK))
    assert done.exit_code == 0, done.output
    [(train, targets, (test, validation))] = seen
    rows = open_folders([str(tree / "kinetics-sounds" / "train")]).rows
    assert not set(train.clips) & set(validation.clips) and set(train.clips) | set(validation.clips) == set(range(9))
    assert len(train) == 2 * 6 and len(validation) == 3 * 3 * 3 and len(test) == 7 * 3 * 3 + 9
    assert targets.tolist() == [rows[clip].labels[0] for clip in train.clips.tolist()]
    scaled = train[:]
    torch.testing.assert_close(scaled.mean(0), torch.zeros(train.channels), atol=1e-4, rtol=0)
    varying = scaled.std(0, correction=0) > 0.5
    assert varying.sum() > 10
    mean, std = mean_and_std(train.scaled(None))
    for other in (test, validation):
        torch.testing.assert_close(other[:], (other.scaled(None)[:] - mean) / std)
        assert (other[:].mean(0).abs() > 1e-3).any()


def test_losses_of_two_heads_are_added(tree, tmp_path, monkeypatch):
    def undecided(self, visual, audio, visual_present, audio_present):
        logits = torch.zeros(*visual_present.shape, 3, requires_grad=True)
        return [logits, logits], visual_present | audio_present

    monkeypatch.setattr(Classifier, "forward", undecided)
    assert run_eval(tree, tmp_path, "kinetics-sounds", *settings(QUICK)).exit_code == 0
    first = json.loads((tmp_path / "split-1/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(2 * math.log(3), abs=1e-5)
    assert all(line["scores"] == pytest.approx([1 / 3] * 3) for line in predictions_of(tmp_path))


def test_softmax_outputs_of_two_heads_are_averaged(tree):
    config = read_config("tiny", NETWORK)
    folder = open_folders([str(tree / "kinetics-sounds" / "test")])
    classifier = Classifier(AVBert(config.model), 3, "both", True, 0.0)
    biases = torch.tensor([[2.0, 0.0, -1.0], [-3.0, 1.0, 0.5]])
    for head, bias in zip((classifier.clip_head, classifier.sequence_head), biases, strict=True):
        nn.init.zeros_(head.projection.weight)
        head.projection.bias.data.copy_(bias)
    protocol = protocol_for("kinetics-sounds", "finetune", "published", ["transfer.test_views=2"])
    found = predict(classifier, folder, folder.rows, config.data, protocol, "both",
                    Runtime(torch.device("cpu"), None))
    assert len(found.videos) == 7
    torch.testing.assert_close(torch.from_numpy(found.scores), biases.double().softmax(1).mean(0).expand(7, 3),
                               rtol=1e-5, atol=1e-6)


def test_hinge_has_the_published_margin():
    protocol = protocol_for("esc50", "linear", "published")
    # right 0.5; the others 0.45 (inside the margin of 0.1 by 0.05), 0.1, 0.9 (by 0.5): summed, over four classes
    loss = task_loss(torch.tensor([[0.45, 0.5, 0.1, 0.9]]), torch.tensor([1]), protocol)
    assert float(loss) == pytest.approx((0.05 + 0.5) / 4)


@pytest.mark.parametrize(("name", "field", "near"), [
    ("linear", "backbone_rate", "head_rate"), ("linear", "train_sequence", "train_views"),
    ("knn", "neighbors", "neighbours"), ("finetune", "epoch", "epochs"),
    ("knn", "epochs", "neighbours"), ("finetune", "neighbours", "epochs")])
def test_a_setting_of_another_protocol_is_none_of_this_one(name, field, near):
    with pytest.raises(AvtrainError) as error:
        protocol_for("ucf101", name, "published", [f"transfer.{field}=1"])
    start, _, known = str(error.value).partition(" There are ")
    assert start == f"transfer.{field}: no such setting of the protocol {name}; did you mean transfer.{near}?"
    assert known.split(", ") == [one.name for one in dataclasses.fields(protocol_for("ucf101", name, "published"))]


@pytest.mark.parametrize(("name", "override", "message"), [
    ("finetune", "epochs=0", "transfer.epochs = 0: at least 1 is wanted"),
    ("finetune", "epochs=1.5", "transfer.epochs = 1.5: a whole number is wanted"),
    ("finetune", "warmup=1", "transfer.warmup = 1.0: at least 0 and under 1 is wanted"),
    ("linear", "head_rate=0", "transfer.head_rate = 0.0: above 0 and at most 100 is wanted"),
    ("linear", "head_rate=nan", "transfer.head_rate = nan: above 0 and at most 100 is wanted"),
    ("linear", "loss=squares", "transfer.loss = 'squares': one of cross_entropy, hinge, binary is wanted"),
    ("knn", "test_crops=2", "transfer.test_crops = 2: one of 1, 3 is wanted"),
    ("knn", "test_crops=true", "transfer.test_crops = True: one of 1, 3 is wanted"),
    ("knn", "test_whole=false", "transfer.test_crops = 3: 1 without test_whole is wanted"),
    ("finetune", "micro_batch=5", "transfer.micro_batch = 5: a divisor of transfer.batch_size (32) is wanted")])
def test_a_wrong_value_says_what_is_wanted(name, override, message):
    with pytest.raises(AvtrainError) as error:
        protocol_for("ucf101", name, "published", [f"transfer.{override}"])
    assert str(error.value) == message
