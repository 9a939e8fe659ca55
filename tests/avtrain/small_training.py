"""A training of seconds for the engine's tests: a small network, random data, a step that draws random numbers."""

import itertools
import json
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from avtrain.config import TrainingConfig
from avtrain.engine import Run
from avtrain.run_folder import RunFolder

CONFIG = TrainingConfig(batch_size=4, steps=20, learning_rate=0.01, log_every=1, evaluate_every=5, save_every=3, keep=2)


@dataclass
class Batch:
    keys: list
    inputs: torch.Tensor


class Batches:
    """Seven batches of four an epoch; counts how many were made."""

    batch_size, parts = 4, 1

    def __init__(self):
        self.made = []

    def __len__(self):
        return 28

    def starting_at(self, first):
        for index in itertools.count(first // 4):
            self.made.append(divmod(index, 7))
            random = torch.Generator().manual_seed(index)
            yield Batch(list("abcd"), torch.randn(4, 8, generator=random))


class Experiment:
    def __init__(self, folder, config=CONFIG, bad_steps=(), mfu_of_clip_per_s=None, wandb=None):
        torch.manual_seed(config.seed)
        self.network = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.weights_saved = []
        optimizer = torch.optim.AdamW(self.network.parameters(), config.learning_rate, fused=True)
        self.run = Run(RunFolder(folder), {"network": self.network}, optimizer, config, self._save,
                       mfu_of_clip_per_s=mfu_of_clip_per_s, wandb=wandb)
        self.batches, self.bad_steps, self.steps = Batches(), set(bad_steps), 0

    def _save(self, folder):
        self.weights_saved.append(folder)
        torch.save(self.network.state_dict(), folder / "weights.pt")

    def step(self, batch, part):
        noise = torch.randn(4, 1)
        self.steps += 1
        inputs = batch.inputs * float("nan") if self.steps in self.bad_steps else batch.inputs
        loss = (self.network(inputs) + 0.1 * noise - inputs.sum(1, keepdim=True)).square().mean()
        return loss, {"twice": 2 * loss.detach()}

    def train(self, **options):
        self.run.train(self.step, self.batches, nullcontext, lambda: {"held_out": 1.0}, **options)


def losses_of(folder):
    return [(line["step"], line["loss"], line["twice"]) for line in map(
        json.loads, (folder / "metrics.jsonl").read_text().splitlines())]
