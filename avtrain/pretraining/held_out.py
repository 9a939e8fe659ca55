"""How well pretraining does on clips it never sees: losses, pair accuracy, masked top-1 among random candidates."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from avtrain.config import Config
from avtrain.data.clips import ClipDataset
from avtrain.data.handover import in_flight_bytes
from avtrain.data.loader import batches, readable
from avtrain.data.order import Wanted, at_epoch, batches_of, epoch_order
from avtrain.data.shards import ShardFolder
from avtrain.models.avbert import LocalEmbeddings, Tokens
from avtrain.pretraining.draw import Draw, drawn, planned
from avtrain.pretraining.module import Pretraining, inputs_of
from avtrain.pretraining.noise import hashed, uniforms
from avtrain.pretraining.objectives import AUDIO, VISUAL, Objectives, present_rows, shared_group
from avtrain.runtime import Runtime

CANDIDATES = 100
_SEED = 12_345
_CANDIDATE = 100  # what a number is for, beside draw.py's


class _Seen(NamedTuple):
    """A batch whose own sounds were kept."""

    embedded: LocalEmbeddings
    tokens: Tokens
    draw: Draw


class HeldOut:
    """Held-out clips, always in the same mixed batches, with the same masks, pairs and candidates.

    Args:
        folder: the held-out shards.
        config: data, batch size and objectives of the run.
        runtime: device and precision.
    """

    def __init__(self, folder: ShardFolder, config: Config, runtime: Runtime) -> None:
        self._dataset = ClipDataset(folder, config.data, None)
        self._workers, self._runtime, self._clips = config.data.workers, runtime, folder.clips
        self._config = config
        order = epoch_order(folder.clips_of_shards, _SEED, 0, len(folder.shards))
        self._places = batches_of(order, config.training.micro_batch or config.training.batch_size)

    def in_flight_bytes(self) -> int:
        """Shared memory that the workers' batches can take."""
        return in_flight_bytes(self._dataset.batch_bytes(next(at_epoch(self._places, 0))), self._workers)

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
        model, objectives = network.model, network.objectives
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        passes: list[_Seen] = []
        first = 0
        for batch in readable(batches(self._dataset, at_epoch(self._places, 0), self._workers), self._clips):
            wanted = [Wanted(place, 0) for place in self._places[first // len(self._places[0])]]
            clips, places = planned(self._dataset, wanted), range(first, first + len(wanted))
            first += len(self._places[0])
            config, device = self._config.objectives, self._runtime.device
            pairs = config.pair > 0 and model.config.fusion != "late"
            mixed = drawn(clips, places, _SEED, 0, config.mask_rate, config.draws, pairs).to(device)
            kept = drawn(clips, places, _SEED, 1, config.mask_rate, 1, False).to(device)
            *inputs, read = inputs_of(batch, len(wanted), device)
            with self._runtime.autocast():
                embedded = model.embed_segments(*inputs)
                result = objectives(model, embedded, mixed, read)
                group = shared_group(embedded, read, kept)
                passes.append(_Seen(embedded, objectives.tokens(model, embedded, group, kept), kept))
            for name, value in {"loss": result.loss, **result.figures()}.items():
                sums[name] += float(value) * len(batch.keys)
                counts[name] += len(batch.keys)
        figures = {f"test_{name}": sums[name] / counts[name] for name in sums}
        for predictor in objectives.predictors:
            found = self._masked_top1(objectives, passes, predictor)
            if found is not None:
                figures[f"test_masked_top1_{predictor}"], figures[f"test_chance_masked_top1_{predictor}"] = found
        network.train(was_training)
        return figures

    def _masked_top1(self, objectives: Objectives, passes: list[_Seen], predictor: str) -> tuple[float, float] | None:
        """The figure and chance; None where there is nothing to predict."""
        modality = VISUAL if predictor.endswith("visual") else AUDIO
        pool = torch.cat([present_rows(seen.embedded.local(modality), seen.draw, modality) for seen in passes])
        hits = positions = before = 0
        for seen in passes:
            predicted = seen.draw.predicted[modality]
            true = predicted.targets + before
            before += len(seen.draw.here[modality])
            if len(true):
                candidates = torch.cat((true[:, None], random_others(true, len(pool), CANDIDATES - 1)), 1)
                used, candidates = candidates.unique(return_inverse=True)
                with self._runtime.autocast():
                    scores = objectives.scores(seen.tokens, predictor, predicted.outputs, pool[used], candidates)
                hits += int((scores[:, :1] > scores[:, 1:]).all(1).sum())
                positions += len(true)
        return (hits / positions, 1 / min(CANDIDATES, len(pool))) if positions else None


def random_others(true: Tensor, size: int, count: int) -> Tensor:
    """For each of `true`, `count` different numbers below `size`, none of them itself: (len(true), count or fewer)."""
    names = torch.arange(size)
    draw = uniforms(hashed(_SEED, _CANDIDATE, true.cpu()[:, None], names), torch.float64)
    draw.scatter_(1, true.cpu()[:, None], -1.0)
    return draw.topk(min(count, size - 1), 1).indices.to(true.device)
