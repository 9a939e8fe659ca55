"""Frozen features judged: a linear classifier, and the nearest neighbours' vote. Both read their rows in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from avtrain.models.heads import ClipHead
from avtrain.progress import bar_options
from avtrain.transfer.feature_file import ClipMeans, FeatureRows, Numbers
from avtrain.transfer.finetune import probabilities, task_loss
from avtrain.transfer.protocols import Linear, Neighbours

_VOTE_TEMPERATURE = 0.07
_BLOCK = (8192, 1 << 26)  # clips that are compared with each other, and their bytes, at the most
_COMPARED_AT_ONCE = 1024

# Numbers of rows -> their class numbers, (rows,), or 0 and 1, (rows, classes), as `task_loss` takes them.
Targets = Callable[[Numbers], Tensor]


def linear_scores(train: FeatureRows, targets: Targets, tests: list[FeatureRows], classes: int, protocol: Linear,
                  seed: int, device: torch.device) -> list[Iterator[tuple[slice, Tensor]]]:
    """Train dropout and a linear layer by Adam, the rate falling in a line to 0.

    Args:
        train, tests: features.
        targets: of the training rows.

    Returns:
        For each test, its rows in parts: which, and their (rows, classes) probabilities.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # start weights, dropout
    head = ClipHead(train.channels, classes, protocol.dropout).to(device)
    optimizer = torch.optim.Adam(head.parameters(), protocol.head_rate, eps=protocol.adam_eps,
                                 weight_decay=protocol.weight_decay)
    steps = protocol.epochs * -(-len(train) // protocol.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in tqdm(range(protocol.epochs), "linear", unit="epoch", leave=False, **bar_options()):
        for rows in torch.randperm(len(train), generator=generator).split(protocol.batch_size):
            chosen = rows.numpy()
            loss = task_loss(head(train[chosen].to(device)), targets(chosen).to(device), protocol)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    head.eval()

    def scores(test: FeatureRows) -> Iterator[tuple[slice, Tensor]]:
        for part in test.parts():
            with torch.no_grad():
                yield part, probabilities(head(test[part].to(device)), protocol).cpu()

    return [scores(test) for test in tests]


def neighbour_scores(train: ClipMeans, targets: Targets, test: ClipMeans, classes: int,
                     protocol: Neighbours) -> Iterator[tuple[slice, Tensor]]:
    """The vote of the nearest training clips by cosine, weighted by exp(cosine / 0.07).

    Args:
        train, test: features.
        targets: of the training clips.

    Yields:
        The test's clips in parts: which, and their (clips, classes) shares of the vote.
    """
    for block in test.parts(*_BLOCK):
        asked = _unit(test[block])
        first = block.start
        for some, (cosines, nearest) in zip(asked.split(_COMPARED_AT_ONCE), _nearest(train, asked, protocol.neighbours),
                                            strict=True):
            voters = targets(nearest.flatten().numpy())
            votes = (F.one_hot(voters, classes).float() if voters.dim() == 1 else voters).view(*nearest.shape, classes)
            weights = ((cosines - 1) / _VOTE_TEMPERATURE).exp()
            yield (slice(first, first + len(some)),
                   (votes * weights[..., None]).sum(1) / weights.sum(1, keepdim=True))
            first += len(some)


def _nearest(train: ClipMeans, asked: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """Cosines and numbers of the nearest training clips, nearest first, (clips, up to count) each, for every
    `_COMPARED_AT_ONCE` of the clips that are asked for; the training clips are gone through once, block by block."""
    found: list[tuple[Tensor, Tensor]] = []
    for block in train.parts(*_BLOCK):
        here = _nearest_of_block(_unit(train[block]), block.start, asked, count)
        found = [_nearest_of_both(*pair, count) for pair in zip(found, here, strict=True)] if found else here
    return found


def _nearest_of_block(known: Tensor, first: int, asked: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """As `_nearest`, of some training clips, which are numbered from `first` on."""
    found = []
    for some in asked.split(_COMPARED_AT_ONCE):
        cosines, numbers = (some @ known.T).topk(min(count, len(known)), 1)
        found.append((cosines, numbers + first))
    return found


def _nearest_of_both(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The nearest among the cosines and numbers of two blocks."""
    cosines, numbers = (torch.cat(pair, 1) for pair in zip(one, other, strict=True))
    cosines, places = cosines.topk(min(count, cosines.shape[1]), 1)
    return cosines, numbers.gather(1, places)


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1, in the place of those that are given."""
    return F.normalize(rows, dim=1, out=rows)
