"""How well pretraining does on clips it never sees: losses, pair accuracy, masked top-1 among random candidates.

At most `training.held_out_clips` clips take part, so that an evaluation takes a bounded time and memory whatever is
held out. A clip here costs its decoding and a forward pass, in training three times that. Even if it cost as much, the
default of 2,048 clips would be 0.2 % of the 1,280,000 that the preset paper trains on from one evaluation to the next,
and 1.3 % of the 160,000 of small. Kept is what candidates and predictions need, in the precision that it comes in: for
2,048 clips of 15 segments and D = 768 94 MB a modality, and 14 MB a predictor at a mask rate of 0.15.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from avtrain.config import Config
from avtrain.data.clips import ClipDataset
from avtrain.data.loader import Batch, UnreadableCount, in_parts, piece_bytes_in_flight
from avtrain.data.order import ClipPlace, Wanted, at_epoch, batches_of, epoch_order
from avtrain.data.shards import ShardFolder
from avtrain.pretraining.draw import Clips, drawn, planned
from avtrain.pretraining.module import Pretraining, inputs_of
from avtrain.pretraining.noise import hashed
from avtrain.pretraining.objectives import AUDIO, VISUAL, present_rows, shared_group
from avtrain.runtime import Runtime, at_least_float32, without_autocast

CANDIDATES = 100
_SEED = 12_345
_CANDIDATE = 100  # what a number is for, beside draw.py's
_AT_ONCE = 2**24  # numbers of candidates' embeddings


class HeldOut:
    """Held-out clips, always in the same mixed parts, with the same masks, pairs and candidates.

    Args:
        folder: the held-out shards.
        config: data, objectives, size of the parts, and how many clips.
        runtime: device and precision.
    """

    def __init__(self, folder: ShardFolder, config: Config, runtime: Runtime) -> None:
        self._dataset = ClipDataset(folder, config.data, None)
        self._workers, self._runtime, self._config = config.data.workers, runtime, config
        order = chosen(folder.clips_of_shards, config.training.held_out_clips, config.data.shards_at_once)
        self._clips = len(order)
        self._places = batches_of(order, config.training.micro_batch or config.training.batch_size)

    def in_flight_bytes(self) -> int:
        """Shared memory that the workers' batches can take."""
        return piece_bytes_in_flight(self._dataset, next(at_epoch(self._places, 0)), self._workers)

    @torch.no_grad()
    def figures(self, network: Pretraining) -> dict[str, float]:
        """Means over the held-out clips, each figure named test_*; the network is left in the mode it was in.

        `test_masked_top1_*`: how often the true embedding of a hidden segment scores highest among itself and 99 drawn
        at random from all other held-out segments, or all of them where there are fewer.
        `test_chance_*`: what each would be for a model that knows nothing.

        Raises:
            AvtrainError: more than 1 % of the clips can't be decoded.
        """
        was_training = network.training
        network.eval()
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = defaultdict(int)
        kept, unreadable, first = _Kept(), UnreadableCount(self._clips), 0
        parts = at_epoch(self._places, 0)
        for wanted, batch in zip(parts, in_parts(self._dataset, at_epoch(self._places, 0), self._workers), strict=True):
            unreadable.add(batch.unreadable)
            if batch.keys:
                for name, value in self._seen(network, wanted, batch, first, kept).items():
                    sums[name] = sums.get(name, 0) + value * len(batch.keys)  # the device isn't waited for
                    counts[name] += len(batch.keys)
            first += len(wanted)
        figures = {f"test_{name}": float(total) / counts[name] for name, total in sums.items()}
        for modality in (VISUAL, AUDIO):
            figures |= self._masked_top1(network, kept, modality)
        network.train(was_training)
        return figures

    def _seen(self, network: Pretraining, wanted: list[Wanted], batch: Batch, first: int,
              kept: _Kept) -> dict[str, Tensor]:
        """Losses and figures of a part, whose first clip has that place among all; what is kept of it is added."""
        model, objectives, config = network.model, network.objectives, self._config.objectives
        *inputs, read = inputs_of(batch, len(wanted), self._runtime.device)
        clips, places = _read_of(planned(self._dataset, wanted), batch), range(first, first + len(wanted))
        pairs = config.pair > 0 and model.config.fusion != "late"
        mixed = drawn(clips, places, _SEED, 0, config.mask_rate, config.draws, pairs).to(self._runtime.device)
        own = drawn(clips, places, _SEED, 1, config.mask_rate, 1, False).to(self._runtime.device)
        with self._runtime.autocast():
            embedded = model.embed_segments(*inputs)
            result = objectives(model, embedded, mixed, read)
            tokens = objectives.tokens(model, embedded, shared_group(embedded, read, own), own)
        for modality in (VISUAL, AUDIO):
            kept.add_segments(modality, present_rows(embedded.local(modality), own, modality),
                              own.predicted[modality].targets)
        for predictor in objectives.predictors:
            positions = own.predicted[_modality(predictor)].outputs
            kept.outputs[predictor].append(objectives.outputs(tokens, predictor)[positions])
        return {"loss": result.loss, **result.figures()}

    def _masked_top1(self, network: Pretraining, kept: _Kept, modality: int) -> dict[str, float]:
        """The figures and chances of a modality's predictors; none where there is nothing to predict."""
        if not kept.pools[modality] or not (positions := sum(map(len, kept.targets[modality]))):
            return {}
        pool, targets = torch.cat(kept.pools[modality]), torch.cat(kept.targets[modality])
        others = random_others(targets, len(pool), CANDIDATES - 1)
        candidates, figures = torch.cat((targets[:, None], others), 1), {}
        for predictor, outputs in kept.outputs.items():
            if _modality(predictor) == modality:
                with self._runtime.autocast():
                    hits = hits_among(network.objectives.predictors[predictor], torch.cat(outputs), pool, candidates)
                figures[f"test_masked_top1_{predictor}"] = hits / positions
                figures[f"test_chance_masked_top1_{predictor}"] = 1 / candidates.shape[1]
        return figures


class _Kept:
    """What is kept of the parts until all candidates are known. Lists of two are (visual, audio)."""

    def __init__(self) -> None:
        self.pools: list[list[Tensor]] = [[], []]  # (present, D) local embeddings
        self.targets: list[list[Tensor]] = [[], []]  # (n,) which of all present segments each hidden one is
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)  # of each predictor, (n, D)
        self._before = [0, 0]

    def add_segments(self, modality: int, local: Tensor, targets: Tensor) -> None:
        """Those of a part; `targets` counts from its first."""
        self.pools[modality].append(local)
        self.targets[modality].append(targets + self._before[modality])
        self._before[modality] += len(local)


def _read_of(clips: Clips, batch: Batch) -> Clips:
    """The clips, where one that could not be read has nothing: neither to predict nor to choose from."""
    read = torch.zeros(len(clips.sources), 1, dtype=torch.bool)
    read[batch.places] = True
    return Clips(clips.visual_present & read, clips.audio_present & read, clips.sources)


def _modality(predictor: str) -> int:
    return VISUAL if predictor.endswith("visual") else AUDIO


def chosen(clips_of_shards: Sequence[int], most: int, shards_at_once: int) -> list[ClipPlace]:
    """Which clips take part, in their order: of each shard its share, mixed among so many shards at a time, so that
    reading moves through the shards."""
    ends = np.cumsum(clips_of_shards, dtype=np.int64)
    ends = ends * min(most, ends[-1]) // ends[-1]
    counts = np.diff(ends, prepend=0).tolist()
    of_shards = [np.random.default_rng([_SEED, shard]).permutation(clips)[:count]
                 for shard, (clips, count) in enumerate(zip(clips_of_shards, counts, strict=True))]
    return [ClipPlace(shard, int(of_shards[shard][position]))
            for shard, position in epoch_order(counts, _SEED, 0, shards_at_once)]


def random_others(true: Tensor, size: int, count: int) -> Tensor:
    """For each of `true`, `count` different numbers below `size`, none of them itself, all sets of them alike likely:
    (len(true), count or fewer), on its device.

    Floyd's way (Bentley, Programming Pearls: a sample of brilliance, 1987): the k-th of c from m numbers is drawn from
    the first m - c + k; what was drawn before is replaced by the last of these, which was not. So there is one draw for
    each, and memory for nothing else.
    """
    count = min(count, size - 1)
    names, others = true.cpu(), torch.empty(count, len(true), dtype=torch.int64)
    for number in range(count):
        last = size - 1 - count + number
        drawn = hashed(_SEED, _CANDIDATE, names, number) % (last + 1)
        others[number] = torch.where((others[:number] == drawn).any(0), last, drawn)
    return (others + (others >= names)).T.to(true.device)


def hits_among(predictor: nn.Module, outputs: Tensor, pool: Tensor, candidates: Tensor) -> int:
    """How many of the outputs score highest with the first of their candidates.

    Args:
        predictor: a `Predictor`.
        outputs: (n, D), of its Transformer.
        pool: (segments, D) local embeddings.
        candidates: (n, candidates) numbers into them.
    """
    prediction, projected = predictor(outputs, pool)
    hits = candidates.new_zeros(())
    with without_autocast(pool):
        for some in torch.arange(len(outputs)).split(max(1, _AT_ONCE // (candidates.shape[1] * pool.shape[1]))):
            first, last = int(some[0]), int(some[-1]) + 1
            among = at_least_float32(projected[candidates[first:last]])
            scores = (among @ at_least_float32(prediction[first:last, :, None]))[..., 0]
            hits = hits + (scores[:, :1] > scores[:, 1:]).all(1).sum()
    return int(hits)
