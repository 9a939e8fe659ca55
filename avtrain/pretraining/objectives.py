"""What pretraining minimises: masked embedding prediction and correct pair prediction (paper, section 3.2).

L = L_MEP + alpha L_CPP. The objectives wrap the model from outside, through `embed` and `contextualize`.
Nothing here is random but dropout: what was drawn is handed in, and nothing waits for the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avtrain import ranks
from avtrain.config import ModelConfig, ObjectivesConfig
from avtrain.models.avbert import AVBert, LocalEmbeddings, Tokens
from avtrain.models.heads import SequenceHead
from avtrain.pretraining.draw import Draw
from avtrain.pretraining.negatives import sample_negatives
from avtrain.runtime import at_least_float32, without_autocast

VISUAL, AUDIO = 0, 1
_START_SCALE = 0.2


class ObjectiveResult(NamedTuple):
    """The loss, and figures of its parts (scalars without gradient): mep_*, pair, pair_accuracy, top1_*; of each the
    share that a part of a batch has in it.

    `chances`: what loss and parts would be here, on average, for a model that knows nothing: one that finds all
    candidates alike, and takes all pairs for right, or all for wrong, whichever is more often true.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    chances: dict[str, Tensor]

    def figures(self) -> dict[str, Tensor]:
        """All but the loss, the chances named chance_*."""
        return {**self.parts, **{f"chance_{name}": value for name, value in self.chances.items()}}


class Objectives(nn.Module):
    """Mask vectors, prediction heads, pair classifier, and the losses made with them.

    Args:
        model: sizes and fusion of the model that is trained.
        config: rates, sampling, weights.
    """

    def __init__(self, model: ModelConfig, config: ObjectivesConfig) -> None:
        super().__init__()
        self.config = config
        self.mask = nn.Parameter(torch.randn(2, model.dimension) * 0.02)
        single = ["visual", "audio"] if model.fusion != "early" else []
        joint = ["multimodal_visual", "multimodal_audio"] if model.fusion != "late" else []
        self.predictors = nn.ModuleDict({name: Predictor(model.dimension) for name in single + joint})
        if model.fusion != "late":
            self.pair = SequenceHead(model.dimension, 1, model.dropout)

    def forward(self, model: AVBert, embedded: LocalEmbeddings, draw: Draw, read: Tensor) -> ObjectiveResult:
        """This process's share of a batch's loss, and of its parts, over all draws of what is random.

        The Transformers cost little beside the CNNs, so several draws say more about a batch at little more cost.
        All parts are computed whatever the batch lacks, so that every parameter has a gradient, of zero at the least.
        Sums are divided by what the whole batch has: the shares of all its parts and processes add up to its means.

        Args:
            model: its CNNs learn too: the targets are their own outputs.
            embedded: what `model.embed` made of this process's clips.
            draw: masks and pairs, on the embeddings' device.
            read: (clips,) boolean: a clip that could not be read counts for nothing.
        """
        config, counts = self.config, draw.counts
        group = shared_group(embedded, read, draw)
        tokens = self.tokens(model, embedded, group, draw)
        parts: dict[str, Tensor] = {}
        chances: dict[str, Tensor] = {}
        losses: dict[str, Tensor] = {}
        zero = at_least_float32(self.mask).sum() * 0
        for modality, name in ((VISUAL, "visual"), (AUDIO, "audio")):
            predicted = draw.predicted[modality]
            candidates, usable = self.candidates(group, draw, modality)
            local, there = present_rows(group.local(modality), draw, modality), group.read[predicted.clips]
            for predictor, part, some, count in (
                    (name, f"mep_{name}", slice(None), counts.predicted[modality]),
                    (f"multimodal_{name}", "mep_multimodal", predicted.joint, counts.joint[modality])):
                if predictor not in self.predictors:
                    continue
                logits = self.scores(tokens, predictor, predicted.outputs[some], local, candidates[some])
                logits = logits.masked_fill(~usable[some], -torch.inf)

                def share(values: Tensor, some: Tensor | slice = some, there: Tensor = there,
                          count: int = count) -> Tensor:
                    return torch.where(there[some], values, 0).sum() / max(1, count)

                losses[part] = losses.get(part, zero) + share(logits.logsumexp(1) - logits[:, 0])
                if count:
                    choices = usable[some].sum(1).to(logits.dtype)
                    parts[part] = losses[part].detach()
                    alone_first = (logits[:, :1] > logits[:, 1:]).all(1)  # a tie is no hit
                    parts[f"top1_{predictor}"] = share(alone_first.to(logits.dtype))
                    chances[f"top1_{predictor}"] = share(1 / choices)
                    chances[part] = chances.get(part, zero.detach()) + share(choices.log())
        weights = {"mep_visual": config.mep_visual, "mep_audio": config.mep_audio,
                   "mep_multimodal": config.mep_multimodal, "pair": config.pair}
        loss = zero
        for part, value in losses.items():
            loss = loss + weights[part] * value
        if hasattr(self, "pair"):
            loss = loss + config.pair * self._pair(tokens, group, draw, parts, chances)
        chances["loss"] = sum((weight * chances[part] for part, weight in weights.items() if part in chances),
                              zero.detach())
        return ObjectiveResult(loss, parts, chances)

    def tokens(self, model: AVBert, embedded: LocalEmbeddings, group: Group, draw: Draw) -> Tokens:
        """The Transformers on the masked clips, each with the sound that it was given.

        Masks are alike in right and wrong pairs, so that they don't tell which is which.
        """
        pairs = draw.pairs
        shown, present = [], []
        for modality, (values, clips) in enumerate(((embedded.visual_local.repeat(draw.draws, 1, 1), pairs.clips),
                                                    (group.audio_local[pairs.sound_of], pairs.sound_of))):
            shown.append(torch.where(draw.masks[modality][..., None], self.mask[modality].to(values.dtype), values))
            present.append(draw.present[modality] & group.read[clips][:, None])
        return model.contextualize(shown[VISUAL], shown[AUDIO], present[VISUAL], present[AUDIO])

    def candidates(self, group: Group, draw: Draw, modality: int) -> tuple[Tensor, Tensor]:
        """What each predicted segment is told from: itself, and negatives.

        Returns:
            (predicted, 1 + negatives) numbers among the group's present segments, itself first; and which count.
        """
        config, predicted = self.config, draw.predicted[modality]
        pooled = present_rows(group.pooled(modality), draw, modality)
        segments = group.visual_local.shape[1]
        negatives, valid = sample_negatives(
            pooled, predicted.targets, predicted.noise, draw.places[modality], config.negatives, config.sampling,
            config.keep_percent, group.read[draw.here[modality] // segments])
        return torch.cat((predicted.targets[:, None], negatives), 1), F.pad(valid, (1, 0), value=True)

    def scores(self, tokens: Tokens, predictor: str, outputs: Tensor, embeddings: Tensor,
               candidates: Tensor) -> Tensor:
        """log I(x, o) = FFN(o)^T W_I x for each predicted position and its candidates.

        Args:
            tokens: what the Transformers made of the masked clips.
            predictor: visual, audio (of the single-modality Transformers), multimodal_visual or multimodal_audio.
            outputs: (n,) positions, row * segments + segment.
            embeddings: (some, D) local embeddings that candidates are taken from.
            candidates: (n, candidates) indices into them.

        Returns:
            (n, candidates) logits, float32 at the least.
        """
        prediction, projected = self.predictors[predictor](self.outputs(tokens, predictor)[outputs], embeddings)
        with without_autocast(prediction):
            # All products, then a choice: no copies of its candidates for every position.
            products: Tensor = at_least_float32(prediction) @ at_least_float32(projected).mT
            return products.gather(1, candidates)

    def outputs(self, tokens: Tokens, predictor: str) -> Tensor:
        """(rows * segments, D): what the Transformer that a predictor belongs to gives for each segment."""
        of_predictor = {"visual": tokens.visual_tokens, "audio": tokens.audio_tokens}.get(predictor)
        if of_predictor is None:
            assert tokens.multimodal_tokens is not None
            of_predictor = tokens.multimodal_tokens.chunk(2, 1)[VISUAL if predictor.endswith("visual") else AUDIO]
        return of_predictor[:, 1:].flatten(0, 1)

    def pair_logits(self, tokens: Tokens) -> Tensor:
        """The pair classifier at every time.

        The paper takes one random time of each clip. The mean over all times is what that is on average, and a batch
        says fifteen times as much.

        Returns:
            (rows, segments) logits, float32 at the least, positive for "same video"; the draw tells which count.
        """
        assert tokens.multimodal_tokens is not None
        logits: Tensor = self.pair(tokens.multimodal_tokens)[..., 0]
        return at_least_float32(logits)

    def _pair(self, tokens: Tokens, group: Group, draw: Draw, parts: dict[str, Tensor],
              chances: dict[str, Tensor]) -> Tensor:
        """The share of the pair loss; its figures are added where any pair of the batch counts."""
        logits = self.pair_logits(tokens)
        pairs, counts = draw.pairs, draw.counts
        read = group.read[pairs.clips] & group.read[pairs.sound_of]
        weights = (pairs.divisors > 0) * read[:, None] / pairs.divisors.clamp(min=1).to(logits.dtype)
        right = pairs.right[:, None].expand_as(logits)
        loss = (F.binary_cross_entropy_with_logits(logits, right.to(logits.dtype), reduction="none") * weights).sum()
        if draw.judged and self.config.pair > 0:
            parts["pair"], parts["pair_accuracy"] = loss.detach(), (((logits > 0) == right) * weights).sum()
            of_all, more_often = weights.sum(), max(counts.right, counts.pairs - counts.right) / counts.pairs
            chances["pair"], chances["pair_accuracy"] = of_all * math.log(2), of_all * more_often
        return loss


class Predictor(nn.Module):
    """FFN (two layers) on outputs and W_I on local embeddings. W_I is a weight matrix divided by sqrt(D).

    Undivided, one Adam step moves all D x D weights by the learning rate, and a score of unit entries by up to D^2
    times it: 59 for the paper's 768 at 1e-4, where ln(candidates) is 4.

    At the start, FFN is near the identity and W_I a small part of it: what is alike scores a little higher. All scores
    are nearly equal, so that the first loss is that of chance, ln(candidates), but the gradient already has a sense.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        inner, outer = nn.Linear(dimension, dimension), nn.Linear(dimension, dimension)
        self.feedforward = nn.Sequential(inner, nn.GELU(), outer)
        self.projection = nn.Linear(dimension, dimension, bias=False)
        with torch.no_grad():
            turn = math.sqrt(2) * nn.init.orthogonal_(torch.empty(dimension, dimension))
            inner.weight.copy_(turn)
            outer.weight.copy_(turn.mT)
            self.projection.weight.copy_(_START_SCALE * torch.eye(dimension))

    def forward(self, outputs: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D), (m, D) -> (n, D), (m, D), whose inner products are the scores."""
        return self.feedforward(outputs), self.projection(embeddings) / math.sqrt(self.projection.in_features)


class Group(NamedTuple):
    """Embeddings of all clips that are chosen among, as in `LocalEmbeddings`; and which of the clips could be read."""

    visual_pooled: Tensor
    audio_pooled: Tensor
    visual_local: Tensor
    audio_local: Tensor
    read: Tensor  # (clips,) boolean

    def pooled(self, modality: int) -> Tensor:
        """As `LocalEmbeddings.pooled`."""
        return (self.visual_pooled, self.audio_pooled)[modality]

    def local(self, modality: int) -> Tensor:
        """As `LocalEmbeddings.local`."""
        return (self.visual_local, self.audio_local)[modality]


def shared_group(embedded: LocalEmbeddings, read: Tensor, draw: Draw) -> Group:
    """This process's clips, and those of the others, where they share the group; gradients reach them.

    Args:
        embedded: of this process's clips.
        read: (clips,) boolean.
        draw: of the group.
    """
    if not draw.shared:
        return Group(*embedded, read)
    pooled = [ranks.gathered(values.detach()) for values in (embedded.visual_pooled, embedded.audio_pooled)]
    local = [ranks.gathered(values) for values in (embedded.visual_local, embedded.audio_local)]
    return Group(pooled[VISUAL], pooled[AUDIO], local[VISUAL], local[AUDIO], ranks.gathered(read.byte()).bool())


def present_rows(values: Tensor, draw: Draw, modality: int) -> Tensor:
    """(clips, segments, channels) -> (present, channels)."""
    return values.flatten(0, 1)[draw.here[modality]]
