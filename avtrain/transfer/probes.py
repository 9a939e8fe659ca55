"""Frozen features judged: a linear classifier, and the nearest neighbours' vote."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from avtrain.models.heads import ClipHead
from avtrain.progress import bar_options
from avtrain.transfer.finetune import probabilities, task_loss
from avtrain.transfer.protocols import Linear, Neighbours

_VOTE_TEMPERATURE = 0.07


def standardized(train: Tensor, *others: Tensor) -> list[Tensor]:
    """All scaled by the mean and std of the first, a column at a time."""
    mean, std = train.mean(0), train.std(0, correction=0).clamp(min=1e-6)
    return [(rows - mean) / std for rows in (train, *others)]


def linear_scores(train: Tensor, targets: Tensor, test: Tensor, classes: int, protocol: Linear, seed: int,
                  device: torch.device) -> Tensor:
    """Train dropout and a linear layer by Adam, the rate falling in a line to 0; (test rows, classes) probabilities.

    Args:
        train, test: (rows, channels) features.
        targets: of the training rows, as `task_loss` takes them.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # start weights, dropout
    head = ClipHead(train.shape[1], classes, protocol.dropout).to(device)
    optimizer = torch.optim.Adam(head.parameters(), protocol.head_rate, eps=protocol.adam_eps,
                                 weight_decay=protocol.weight_decay)
    train, targets = train.to(device), targets.to(device)
    steps = protocol.epochs * -(-len(train) // protocol.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in tqdm(range(protocol.epochs), "linear", unit="epoch", leave=False, **bar_options()):
        for rows in torch.randperm(len(train), generator=generator).split(protocol.batch_size):
            rows = rows.to(device)
            loss = task_loss(head(train[rows]), targets[rows], protocol)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    head.eval()
    with torch.no_grad():
        return probabilities(head(test.to(device)), protocol).cpu()


def neighbour_scores(train: Tensor, targets: Tensor, test: Tensor, classes: int, protocol: Neighbours) -> Tensor:
    """The vote of the nearest training rows by cosine, weighted by exp(cosine / 0.07): (test rows, classes).

    Args:
        train, test: (rows, channels) features.
        targets: (training rows,) class numbers, or (training rows, classes) of 0 and 1.
    """
    votes = F.one_hot(targets, classes).float() if targets.dim() == 1 else targets
    known = F.normalize(train, dim=1)
    scores = []
    for some in F.normalize(test, dim=1).split(1024):
        nearest = (some @ known.T).topk(min(protocol.neighbours, len(train)), 1)
        weights = ((nearest.values - 1) / _VOTE_TEMPERATURE).exp()
        scores.append((votes[nearest.indices] * weights[..., None]).sum(1) / weights.sum(1, keepdim=True))
    return torch.cat(scores)
