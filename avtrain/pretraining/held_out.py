"""How well pretraining does on clips it never sees: losses, pair accuracy, masked top-1 among random candidates."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from avtrain.config import Config
from avtrain.data.clips import ClipDataset
from avtrain.data.handover import in_flight_bytes
from avtrain.data.loader import batches, readable
from avtrain.data.order import at_epoch, batches_of, epoch_order
from avtrain.data.shards import ShardFolder
from avtrain.models.avbert import AVBert
from avtrain.pretraining.objectives import AUDIO, VISUAL, MaskedPass, Objectives
from avtrain.runtime import Runtime

CANDIDATES = 100
_SEED = 12_345


class HeldOut:
    """Held-out clips, always in the same mixed batches, with the same masks, pairs and candidates.

    Args:
        folder: the held-out shards.
        config: data and batch size of the run.
        runtime: device and precision.
    """

    def __init__(self, folder: ShardFolder, config: Config, runtime: Runtime) -> None:
        self._dataset = ClipDataset(folder, config.data, None)
        self._workers, self._runtime, self._clips = config.data.workers, runtime, folder.clips
        order = epoch_order(folder.clips_of_shards, _SEED, 0, len(folder.shards))
        self._places = batches_of(order, config.training.batch_size // config.training.accumulate)

    def in_flight_bytes(self) -> int:
        """Shared memory that the workers' batches can take."""
        return in_flight_bytes(self._dataset.batch_bytes(next(at_epoch(self._places, 0))), self._workers)

    @torch.no_grad()
    def figures(self, model: AVBert, objectives: Objectives) -> dict[str, float]:
        """Means over the held-out clips, each figure named test_*; the model is left in the mode it was in.

        `test_masked_top1_*`: how often the true embedding of a hidden segment scores highest among itself and 99 drawn
        at random from all other held-out segments, or all of them where there are fewer.
        `test_chance_*`: what each would be for a model that knows nothing.

        Raises:
            AvtrainError: more than 1 % of the clips can't be decoded.
        """
        was_training = model.training
        model.eval()
        objectives.eval()
        generator = torch.Generator().manual_seed(_SEED)
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        passes: list[MaskedPass] = []
        for batch in readable(batches(self._dataset, at_epoch(self._places, 0), self._workers), self._clips):
            with self._runtime.autocast():
                embedded = model.embed(*batch.tensors(self._runtime.device))
                result = objectives(model, embedded, generator)
                passes.append(objectives.masked_pass(model, embedded, generator, wrong_pairs=False))
            for name, value in {"loss": result.loss, **result.figures()}.items():
                sums[name] += float(value) * len(batch.keys)
                counts[name] += len(batch.keys)
        figures = {f"test_{name}": sums[name] / counts[name] for name in sums}
        for predictor in objectives.predictors:
            found = self._masked_top1(objectives, passes, predictor, generator)
            if found is not None:
                figures[f"test_masked_top1_{predictor}"], figures[f"test_chance_masked_top1_{predictor}"] = found
        model.train(was_training)
        objectives.train(was_training)
        return figures

    def _masked_top1(self, objectives: Objectives, passes: list[MaskedPass], predictor: str,
                     generator: torch.Generator) -> tuple[float, float] | None:
        """The figure and chance; None where there is nothing to predict."""
        modality = VISUAL if predictor.endswith("visual") else AUDIO
        pool = torch.cat([seen.local[modality][seen.present[modality]] for seen in passes])
        hits = positions = before = 0
        for seen in passes:
            present = seen.present[modality]
            numbers = before + present.flatten().cumsum(0) - 1
            true = numbers[seen.predicted[modality].flatten()]
            before += int(present.sum())
            if len(true):
                candidates = torch.cat((true[:, None], random_others(true, len(pool), CANDIDATES - 1, generator)), 1)
                used, candidates = candidates.unique(return_inverse=True)
                with self._runtime.autocast():
                    scores = objectives.scores(seen, predictor, pool[used], candidates)
                hits += int((scores[:, :1] > scores[:, 1:]).all(1).sum())
                positions += len(true)
        return (hits / positions, 1 / min(CANDIDATES, len(pool))) if positions else None


def random_others(true: Tensor, size: int, count: int, generator: torch.Generator) -> Tensor:
    """For each of `true`, `count` different numbers below `size`, none of them itself: (len(true), count or fewer)."""
    draw = torch.rand(len(true), size, generator=generator).to(true.device)
    draw.scatter_(1, true[:, None], -1.0)
    return draw.topk(min(count, size - 1), 1).indices

