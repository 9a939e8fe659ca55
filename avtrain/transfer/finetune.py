"""Finetuning: the CNNs of a model with the heads of a task, and with the Transformers where a video is a sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from avtrain import ranks
from avtrain.checkpoints.ours import parts_of, save_model
from avtrain.config import Config, DataConfig, TrainingConfig
from avtrain.data.augment import SoundAugmentation
from avtrain.data.clips import ClipDataset
from avtrain.data.handover import check_room, in_flight_bytes
from avtrain.data.loader import Batch, Epochs, UnreadableCount, batches
from avtrain.data.manifest import ClipRows
from avtrain.data.order import ClipPlace, Cut, Wanted, cut_of
from avtrain.data.shards import ShardFolder
from avtrain.data.views import Views
from avtrain.engine import Run
from avtrain.errors import AvtrainError, Unreadable
from avtrain.files import written_whole
from avtrain.models.avbert import AVBert
from avtrain.models.heads import ClipHead, SequenceHead
from avtrain.progress import bar_options
from avtrain.run_folder import RunFolder
from avtrain.runtime import Runtime, at_least_float32, seed_everything
from avtrain.transfer.predictions import Predictions, ScoreSums, metrics_of, targets_of
from avtrain.transfer.protocols import HINGE_MARGIN, Finetune, Protocol, Trained
from avtrain.turns import Turns, own

_SAVE_EVERY = 500
# Segments of a test batch: pictures are large, spectrograms small.
_TEST_SEGMENTS = {"visual": 60, "both": 60, "audio": 320}


class Classifier(nn.Module):
    """A model with a head on its CNNs' outputs and, for sequences, a second one on the Transformers'.

    Args:
        model: its weights are trained on.
        classes: outputs.
        modality: visual, audio or both.
        sequence: use the Transformers and the second head.
        dropout: of the heads.
    """

    def __init__(self, model: AVBert, classes: int, modality: str, sequence: bool, dropout: float) -> None:
        super().__init__()
        self.model, self._modality = model, modality
        outputs = {"visual": model.visual_cnn.outputs, "audio": model.audio_cnn.outputs}
        self.clip_head = ClipHead(outputs.get(modality, sum(outputs.values())), classes, dropout)
        self.sequence_head = SequenceHead(model.config.dimension, classes, dropout) if sequence else None

    def forward(self, visual: Tensor, audio: Tensor, visual_present: Tensor,
                audio_present: Tensor) -> tuple[list[Tensor], Tensor]:
        """Shapes as in `AVBert.forward` -> (logits of each head, (rows, segments, classes); which segments count).

        A row with nothing to see or hear is answered from zeros, at every segment.
        """
        local, visual_present, audio_present = self.model.embed(visual, audio, visual_present, audio_present)
        pooled = {"visual": [local.visual_pooled], "audio": [local.audio_pooled]}.get(
            self._modality, [local.visual_pooled, local.audio_pooled])
        logits = [self.clip_head(*pooled)]
        if self.sequence_head is not None:
            tokens = self.model.contextualize(local.visual_local, local.audio_local, visual_present, audio_present)
            if tokens.multimodal_tokens is not None:
                logits.append(self.sequence_head(tokens.multimodal_tokens))
            else:  # late fusion
                assert tokens.visual_tokens is not None and tokens.audio_tokens is not None
                logits.append(self.sequence_head(torch.cat((tokens.visual_tokens, tokens.audio_tokens), 1)))
        counts = visual_present | audio_present
        return logits, counts | ~counts.any(1, keepdim=True)

    def trained(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """(backbone, heads): the modules that finetuning changes."""
        if self.sequence_head is not None:
            return [self.model], [self.clip_head, self.sequence_head]
        cnns: dict[str, list[nn.Module]] = {"visual": [self.model.visual_cnn], "audio": [self.model.audio_cnn]}
        return cnns.get(self._modality, [self.model.visual_cnn, self.model.audio_cnn]), [self.clip_head]


def _epochs(dataset: ClipDataset, items: Sequence[tuple[ClipPlace, int | None]], protocol: Finetune,
            seed: int) -> Epochs:
    """Every item once an epoch, shuffled; a last part that is not full is left out, for BatchNorm's sake.

    Raises:
        AvtrainError: a batch does not come out even among the processes, or they are more than there are items.
    """
    cut = cut_of(protocol.batch_size, protocol.micro_batch, ranks.rank(), ranks.ranks(), "transfer")
    share = min(cut.micro_batch, len(items) // cut.ranks)
    if not share:
        raise AvtrainError(f"{cut.ranks} processes can't finetune on {len(items)} rows: use fewer")
    size = share * cut.ranks

    @lru_cache(maxsize=2)
    def order(epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([seed, epoch]).permutation(len(items))

    def clips_of(epoch: int, first: int, last: int) -> list[Wanted]:
        chosen = (items[index] for index in order(epoch)[first:last])
        return [Wanted(place, epoch, part) for place, part in chosen]

    return Epochs(dataset, clips_of, len(items) // size * size, Cut(size * cut.parts, share, cut.rank, cut.ranks),
                  dataset.folder.clips, dataset.config.workers)


def fixed_views(protocol: Protocol, modality: str) -> Views:
    """The fixed views of the test."""
    crops = protocol.test_crops if modality != "audio" else 1
    return Views(modality, protocol.test_views, crops, protocol.test_whole, protocol.sequence)


def finetune(model: AVBert, parts: frozenset[str], folder: ShardFolder, train: ClipRows,
             validation: ClipRows, data: DataConfig, protocol: Finetune, modality: str, out: Path,
             runtime: Runtime, seed: int, wandb: str | None = None) -> Classifier:
    """Train a model and new heads, or go on with the run in `out` from its last checkpoint; the last epoch counts.
    Several processes share every batch; all of them have the same weights.

    Args:
        model: changed in place.
        parts: what of it was trained before: see `Checkpoint`.
        folder: shards of the training split.
        train, validation: its clips, in two parts; the second is only looked at, after every epoch.
        data: what the model takes.
        protocol: the settings.
        modality: visual, audio or both.
        out: folder of the run: checkpoints, metrics.jsonl.
        runtime: device and precision.
        seed: of heads, order, crops, masks, dropout.
        wandb: the project on Weights & Biases; None: none.

    Raises:
        AvtrainError: shards and model don't fit; too much is unreadable; the loss stays not finite.
    """
    seed_everything(seed)
    classifier = Classifier(model, len(folder.classes), modality, protocol.sequence, protocol.dropout)
    classifier.to(runtime.device, runtime.dtype)
    sound = SoundAugmentation(equalizer=protocol.equalizer, frequency_shift=protocol.frequency_shift,
                              frequency_mask=protocol.frequency_mask, time_mask=protocol.time_mask)
    views = Views(modality, protocol.train_views, sequence=protocol.sequence, random_start=protocol.random_start,
                  sound=sound)
    whole = protocol.sequence or protocol.random_start
    items = [(clip.place, part) for clip in train for part in ([None] if whole else range(protocol.train_views))]
    epochs = _epochs(ClipDataset(folder, data, seed, views), items, protocol, seed)
    steps_an_epoch = max(1, len(epochs) // epochs.batch_size)
    training = TrainingConfig(
        batch_size=protocol.batch_size, steps=protocol.epochs * steps_an_epoch, learning_rate=protocol.head_rate,
        warmup=protocol.warmup, weight_decay=protocol.weight_decay, clip_norm=0.0, log_every=1,
        evaluate_every=steps_an_epoch, save_every=_SAVE_EVERY, keep=1, seed=seed)

    def save_weights(to: Path) -> None:
        save_model(to / "model.safetensors", model, Config(model=model.config, data=data),
                   parts | parts_of(modality, protocol.sequence))
        heads = {name: tensor.cpu().contiguous() for name, tensor in classifier.state_dict().items()
                 if not name.startswith("model.")}
        with written_whole(to / "heads.safetensors") as temporary:
            save_file(heads, temporary)

    if validation:  # its batches are made beside those of training
        dataset, tests = _test_views(folder, validation, data, protocol, modality)
        looked_at = dataset.batch_bytes(tests[0])
        check_room(epochs.in_flight_bytes() + in_flight_bytes(looked_at, data.workers))
    run = Run(RunFolder(out), {"classifier": classifier}, _optimizer(classifier, protocol), training, save_weights,
              runtime.scaled, wandb=wandb)
    run.go_on(epochs)
    several = ranks.ranks() > 1
    if several:
        model.measure_over_ranks()
    wrapped = ranks.averaging(classifier, runtime.device, True, unused=True)

    def step(batch: Batch, part: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not (batch.keys or several):  # a part may be a single video
            return torch.zeros((), device=runtime.device, requires_grad=True), {}
        if part == 0 and several:  # dropout, which a process that went on would else draw as the first one did
            torch.manual_seed(int(np.random.SeedSequence([seed, run.position.step, ranks.rank()]).generate_state(1)[0]))
        last = part == epochs.parts - 1
        with nullcontext() if last or wrapped is classifier else wrapped.no_sync():
            logits, counts = wrapped(*(batch if batch.keys else _absent(batch)).tensors(runtime.device))
        return _share(_loss(logits, counts, batch.labels, protocol), counts, bool(batch.keys)) / epochs.parts, {}

    def evaluate() -> dict[str, float]:
        found = predict(classifier, folder, validation, data, protocol, modality, runtime, alone=True)
        classifier.train()
        return {f"validation_{name}": figure.value
                for name, figure in metrics_of(found, protocol.loss == "binary", seed).items()}

    classifier.train()
    run.train(step, epochs, runtime.autocast, evaluate if validation else None)
    return classifier


def _optimizer(classifier: Classifier, protocol: Finetune) -> torch.optim.Optimizer:
    """Adam with one group for norms and one for the rest, of backbone and of heads."""
    groups = []
    for modules, rate in zip(classifier.trained(), (protocol.backbone_rate, protocol.head_rate), strict=True):
        inside = [module for parent in modules for module in parent.modules()]
        norms = {id(parameter) for module in inside if isinstance(module, _BatchNorm | nn.LayerNorm)
                 for parameter in module.parameters()}
        parameters = [parameter for parent in modules for parameter in parent.parameters()]
        for decayed in (True, False):
            groups.append({"params": [one for one in parameters if (id(one) not in norms) == decayed],
                           "weight_decay": protocol.weight_decay if decayed else 0.0,
                           "rate_scale": rate / protocol.head_rate})
    return torch.optim.Adam(groups, lr=protocol.head_rate, eps=protocol.adam_eps, fused=True)


def _loss(logits: list[Tensor], counts: Tensor, labels: list[list[int]], protocol: Finetune) -> Tensor:
    """The heads' losses added, each the mean over the segments that count; 0 where there are no labels, with a gradient
    of 0 for all that a process that has some has a gradient for."""
    if not labels:
        return 0 * torch.stack([of_head.sum() for of_head in logits]).sum()
    targets = targets_of(labels, logits[0].shape[-1], protocol.loss == "binary").to(counts.device)
    rows = counts.nonzero()[:, 0]
    losses = [task_loss(at_least_float32(of_head[counts]), targets[rows], protocol) for of_head in logits]
    return torch.stack(losses).sum()


def _share(mean: Tensor, counts: Tensor, any_rows: bool) -> Tensor:
    """What a process's mean adds to that of all of them, over the segments that count."""
    if ranks.ranks() == 1:
        return mean
    own_count = counts.sum() * any_rows
    return mean * own_count / ranks.summed(own_count).clamp(min=1)


def _absent(batch: Batch) -> Batch:
    """A batch without rows with one that holds nothing: what it goes through is what the other processes wait in."""
    nothing = torch.zeros(1, batch.visual_present.shape[1], dtype=torch.bool)
    return dataclasses.replace(batch, visual_present=nothing, audio_present=nothing)


def task_loss(logits: Tensor, targets: Tensor, protocol: Trained) -> Tensor:
    """The protocol's loss: (rows, classes) and (rows,) class numbers, or (rows, classes) of 0 and 1 for binary."""
    if protocol.loss == "binary":
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
    if protocol.loss == "hinge":
        return F.multi_margin_loss(logits, targets, margin=HINGE_MARGIN)
    return F.cross_entropy(logits, targets, label_smoothing=protocol.label_smoothing)


def probabilities(logits: Tensor, protocol: Trained) -> Tensor:
    """Softmax over the classes, or a sigmoid of each for binary."""
    logits = at_least_float32(logits)
    return logits.sigmoid() if protocol.loss == "binary" else logits.softmax(-1)


@torch.no_grad()
def predict(classifier: Classifier, folder: ShardFolder, clips: ClipRows, data: DataConfig,
            protocol: Finetune, modality: str, runtime: Runtime, alone: bool = False) -> Predictions:
    """Outputs of all views, crops, segments and heads of a video, averaged. Leaves the classifier in eval mode.

    Several processes share the videos, and the first one has what comes of it; with `alone` it does all by itself.
    """
    classifier.eval()
    sums, unreadable = ScoreSums(clips, len(folder.classes)), UnreadableCount(folder.clips)
    dataset, items = _test_views(folder, clips, data, protocol, modality)
    mine = items if alone else list(own(items))

    def made() -> Iterator[tuple[list[Unreadable], list[str], Tensor]]:
        supply = batches(dataset, mine, data.workers)
        for batch in tqdm(supply, "test", len(mine), unit="batch", leave=False, **bar_options()):
            scores = _scores(classifier, batch, protocol, runtime) if batch.keys else torch.empty(0)
            yield batch.unreadable, batch.keys, scores

    def take(parts: Iterable[tuple[list[Unreadable], list[str], Tensor]]) -> None:
        for lost, keys, scores in parts:
            unreadable.add(lost)
            sums.add(keys, scores)

    if alone:
        take(made())
    else:
        Turns(made(), len(items)).taken(take)
    return sums.predictions()


def _scores(classifier: Classifier, batch: Batch, protocol: Finetune, runtime: Runtime) -> Tensor:
    """(rows, classes): the mean over heads and the segments that count, on the CPU."""
    with runtime.autocast():
        logits, counts = classifier(*batch.tensors(runtime.device))
    scores = torch.stack([probabilities(of_head, protocol) for of_head in logits]).mean(0)
    weights = counts.to(scores.dtype) / counts.sum(1, keepdim=True)
    mean: Tensor = (scores * weights[..., None]).sum(1).cpu()
    return mean


def _test_views(folder: ShardFolder, clips: ClipRows, data: DataConfig, protocol: Finetune,
                modality: str) -> tuple[ClipDataset, list[list[Wanted]]]:
    """The test's views of these clips, and its batches."""
    views = fixed_views(protocol, modality)
    size = max(1, _TEST_SEGMENTS[modality] // (views.clips * views.crops))
    items = [Wanted(clip.place, 0) for clip in clips]
    return (ClipDataset(folder, data, None, views),
            [items[first:first + size] for first in range(0, len(items), size)])
