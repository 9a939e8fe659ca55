"""Finetuning: the CNNs of a model with the heads of a task, and with the Transformers where a video is a sequence."""

from __future__ import annotations

from collections.abc import Sequence
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

from avtrain.checkpoints.ours import parts_of, save_model
from avtrain.config import Config, DataConfig, TrainingConfig
from avtrain.data.augment import SoundAugmentation
from avtrain.data.clips import ClipDataset
from avtrain.data.handover import check_room, in_flight_bytes
from avtrain.data.loader import Batch, Epochs, batches, readable
from avtrain.data.manifest import ClipRows
from avtrain.data.order import ClipPlace, Cut, Wanted, cut_of
from avtrain.data.shards import ShardFolder
from avtrain.data.views import Views
from avtrain.engine import Run
from avtrain.files import written_whole
from avtrain.models.avbert import AVBert
from avtrain.models.heads import ClipHead, SequenceHead
from avtrain.progress import bar_options
from avtrain.run_folder import RunFolder
from avtrain.runtime import Runtime, seed_everything
from avtrain.transfer.predictions import Predictions, ScoreSums, metrics_of, targets_of
from avtrain.transfer.protocols import HINGE_MARGIN, Finetune, Protocol, Trained

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
    """Every item once an epoch, shuffled; a last part that is not full is left out, for BatchNorm's sake."""
    cut = cut_of(protocol.batch_size, protocol.micro_batch, section="transfer")
    size = min(cut.micro_batch, len(items))

    @lru_cache(maxsize=2)
    def order(epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([seed, epoch]).permutation(len(items))

    def clips_of(epoch: int, first: int, last: int) -> list[Wanted]:
        chosen = (items[index] for index in order(epoch)[first:last])
        return [Wanted(place, epoch, part) for place, part in chosen]

    return Epochs(dataset, clips_of, len(items) // size * size, Cut(size * cut.parts, size), dataset.folder.clips,
                  dataset.config.workers)


def fixed_views(protocol: Protocol, modality: str) -> Views:
    """The fixed views of the test."""
    crops = protocol.test_crops if modality != "audio" else 1
    return Views(modality, protocol.test_views, crops, protocol.test_whole, protocol.sequence)


def finetune(model: AVBert, parts: frozenset[str], folder: ShardFolder, train: ClipRows,
             validation: ClipRows, data: DataConfig, protocol: Finetune, modality: str, out: Path,
             runtime: Runtime, seed: int) -> Classifier:
    """Train a model and new heads, or go on with the run in `out` from its last checkpoint; the last epoch counts.

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

    Raises:
        AvtrainError: shards and model don't fit; too much is unreadable; the loss stays not finite.
    """
    seed_everything(seed)
    classifier = Classifier(model, len(folder.classes), modality, protocol.sequence, protocol.dropout)
    classifier.to(runtime.device)
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
              runtime.scaled)
    run.go_on(epochs)

    def step(batch: Batch, part: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not batch.keys:  # a part may be a single video
            return torch.zeros((), device=runtime.device, requires_grad=True), {}
        logits, counts = classifier(*batch.tensors(runtime.device))
        return _loss(logits, counts, batch.labels, protocol) / epochs.parts, {}

    def evaluate() -> dict[str, float]:
        found = predict(classifier, folder, validation, data, protocol, modality, runtime)
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
    """The heads' losses added, each the mean over the segments that count."""
    targets = targets_of(labels, logits[0].shape[-1], protocol.loss == "binary").to(counts.device)
    rows = counts.nonzero()[:, 0]
    losses = [task_loss(of_head[counts].float(), targets[rows], protocol) for of_head in logits]
    return torch.stack(losses).sum()


def task_loss(logits: Tensor, targets: Tensor, protocol: Trained) -> Tensor:
    """The protocol's loss: (rows, classes) and (rows,) class numbers, or (rows, classes) of 0 and 1 for binary."""
    if protocol.loss == "binary":
        return F.binary_cross_entropy_with_logits(logits, targets)
    if protocol.loss == "hinge":
        return F.multi_margin_loss(logits, targets, margin=HINGE_MARGIN)
    return F.cross_entropy(logits, targets, label_smoothing=protocol.label_smoothing)


def probabilities(logits: Tensor, protocol: Trained) -> Tensor:
    """Softmax over the classes, or a sigmoid of each for binary."""
    return logits.float().sigmoid() if protocol.loss == "binary" else logits.float().softmax(-1)


@torch.no_grad()
def predict(classifier: Classifier, folder: ShardFolder, clips: ClipRows, data: DataConfig,
            protocol: Finetune, modality: str, runtime: Runtime) -> Predictions:
    """Outputs of all views, crops, segments and heads of a video, averaged. Leaves the classifier in eval mode."""
    classifier.eval()
    sums = ScoreSums(clips, len(folder.classes))
    dataset, items = _test_views(folder, clips, data, protocol, modality)
    supply = batches(dataset, items, data.workers)
    bar = tqdm(supply, "test", len(items), unit="batch", leave=False, **bar_options())
    for batch in readable(bar, folder.clips):
        with runtime.autocast():
            logits, counts = classifier(*batch.tensors(runtime.device))
        scores = torch.stack([probabilities(of_head, protocol) for of_head in logits]).mean(0)
        weights = counts.float() / counts.sum(1, keepdim=True)
        sums.add(batch.keys, (scores * weights[..., None]).sum(1))
    return sums.predictions()


def _test_views(folder: ShardFolder, clips: ClipRows, data: DataConfig, protocol: Finetune,
                modality: str) -> tuple[ClipDataset, list[list[Wanted]]]:
    """The test's views of these clips, and its batches."""
    views = fixed_views(protocol, modality)
    size = max(1, _TEST_SEGMENTS[modality] // (views.clips * views.crops))
    items = [Wanted(clip.place, 0) for clip in clips]
    return (ClipDataset(folder, data, None, views),
            [items[first:first + size] for first in range(0, len(items), size)])
