"""What pretraining minimises: masked embedding prediction and correct pair prediction (paper, section 3.2).

L = L_MEP + alpha L_CPP. The objectives wrap the model from outside, through `embed` and `contextualize`.
All that is random here is drawn from the generator that is handed in.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avtrain.config import ModelConfig, ObjectivesConfig
from avtrain.models.avbert import AVBert, LocalEmbeddings, Tokens
from avtrain.models.heads import SequenceHead
from avtrain.pretraining.negatives import sample_negatives

VISUAL, AUDIO = 0, 1
_START_SCALE = 0.2

Embedded = tuple[LocalEmbeddings, Tensor, Tensor]  # what `AVBert.embed` returns


class ObjectiveResult(NamedTuple):
    """The loss, and figures of its parts (scalars without gradient): mep_*, pair, pair_accuracy, top1_*.

    `chances`: what loss and parts would be here, on average, for a model that knows nothing: one that finds all
    candidates alike, and takes all pairs for right, or all for wrong, whichever is more often true.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    chances: dict[str, Tensor]

    def figures(self) -> dict[str, Tensor]:
        """All but the loss, the chances named chance_*."""
        return {**self.parts, **{f"chance_{name}": value for name, value in self.chances.items()}}


class MaskedPass(NamedTuple):
    """One pass of the Transformers over `draws` differently masked copies of a batch. Lists are (visual, audio).

    Attributes:
        pooled, local: of every segment, before masking, (batch, segments, channels or D).
        present: (batch, segments) boolean, of each clip's own segments.
        predicted: (draws * batch, segments) boolean, masked positions that count: not those of wrong pairs.
        tokens: what the Transformers made of the masked clips, draws * batch of them.
        both: (draws * batch, segments) boolean, where picture and (maybe another clip's) sound are there together.
        right: (draws * batch,) boolean, whether sound and picture are of the same video.
    """

    pooled: list[Tensor]
    local: list[Tensor]
    present: list[Tensor]
    predicted: list[Tensor]
    tokens: Tokens
    both: Tensor
    right: Tensor


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

    def forward(self, model: AVBert, embedded: Embedded, generator: torch.Generator) -> ObjectiveResult:
        """The loss of a batch, and its parts, over `draws` draws of all that is random.

        The Transformers cost little beside the CNNs, so several draws say more about a batch at little more cost.

        Args:
            model: its CNNs learn too: the targets are their own outputs.
            embedded: what `model.embed` made of the batch.
            generator: on the CPU; decides masks, wrong pairs, negatives.
        """
        config = self.config
        pairs = config.pair > 0 and hasattr(self, "pair")
        seen = self.masked_pass(model, embedded, generator, wrong_pairs=pairs, draws=config.draws)
        parts: dict[str, Tensor] = {}
        chances: dict[str, Tensor] = {}
        losses: dict[str, list[Tensor]] = {"mep_visual": [], "mep_audio": [], "mep_multimodal": []}
        loss = self.mask.sum() * 0  # a batch with nothing to predict still has a gradient: zero
        for modality, name in ((VISUAL, "visual"), (AUDIO, "audio")):
            if not bool(seen.predicted[modality].any()):
                continue
            present = seen.present[modality]
            pooled, local = seen.pooled[modality][present], seen.local[modality][present]
            positives = _index_among(seen.predicted[modality], present)
            negatives, valid = sample_negatives(pooled, positives, config.negatives, config.sampling,
                                                config.keep_percent, generator)
            candidates = torch.cat((positives[:, None], negatives), 1)
            usable = F.pad(valid, (1, 0), value=True)
            for predictor, part in ((name, f"mep_{name}"), (f"multimodal_{name}", "mep_multimodal")):
                if predictor in self.predictors:
                    logits = self.scores(seen, predictor, local, candidates).masked_fill(~usable, -torch.inf)
                    losses[part].append(_nce(logits))
                    parts[f"top1_{predictor}"] = (logits.argmax(1) == 0).float().mean()
                    count = usable.sum(1).float()
                    chances[f"top1_{predictor}"] = (1 / count).mean()
                    chances[part] = chances.get(part, 0) + count.log().mean()
        for part, values in losses.items():
            if values:
                parts[part] = torch.stack(values).sum().detach()
                loss = loss + getattr(config, part) * torch.stack(values).sum()
        if pairs and bool(seen.both.any()):
            logits_of_pairs = self.pair_logits(seen)
            right = seen.right[:, None].expand_as(logits_of_pairs)
            losses_of_pairs = F.binary_cross_entropy_with_logits(logits_of_pairs, right.float(), reduction="none")
            pair = _mean_over_times(losses_of_pairs, seen.both)
            parts["pair"] = pair.detach()
            share = _mean_over_times(right.float(), seen.both)
            chances["pair"], chances["pair_accuracy"] = loss.new_tensor(math.log(2)), torch.maximum(share, 1 - share)
            parts["pair_accuracy"] = _mean_over_times(((logits_of_pairs > 0) == right).float(), seen.both)
            loss = loss + config.pair * pair
        chances["loss"] = sum((getattr(config, part) * chances[part] for part in (*losses, "pair") if part in chances),
                              loss.new_zeros(()))
        return ObjectiveResult(loss, parts, chances)

    def masked_pass(self, model: AVBert, embedded: Embedded, generator: torch.Generator, wrong_pairs: bool,
                    draws: int = 1) -> MaskedPass:
        """Mask, give half of the clips another clip's sound (if `wrong_pairs`), and run the Transformers.

        Masks are alike in right and wrong pairs, so that they don't tell which is which.
        """
        embeddings, *present = embedded
        local = [embeddings.visual_local, embeddings.audio_local]
        (seen, heard), batch = (there.repeat(draws, 1) for there in present), len(local[VISUAL])
        masks = [masked_positions(there, self.config.mask_rate, generator) for there in (seen, heard)]
        shown = [torch.where(mask[..., None], self.mask[modality].to(values.dtype), values.repeat(draws, 1, 1))
                 for modality, (mask, values) in enumerate(zip(masks, local, strict=True))]
        itself = sound_of = torch.arange(draws * batch, device=seen.device)
        if wrong_pairs:
            eligible = present[VISUAL].any(1) & present[AUDIO].any(1)
            sound_of = torch.cat([of_draw + draw * batch
                                  for draw, of_draw in enumerate(wrong_sounds(eligible, draws, generator))])
        right = sound_of == itself
        tokens = model.contextualize(shown[VISUAL], shown[AUDIO][sound_of], seen, heard[sound_of])
        predicted = [mask & right[:, None] for mask in masks]
        return MaskedPass([embeddings.visual_pooled, embeddings.audio_pooled], local, present, predicted, tokens,
                          seen & heard[sound_of], right)

    def scores(self, seen: MaskedPass, predictor: str, embeddings: Tensor, candidates: Tensor) -> Tensor:
        """log I(x, o) = FFN(o)^T W_I x for each predicted position and its candidates.

        Args:
            seen: the masked pass.
            predictor: visual, audio (of the single-modality Transformers), multimodal_visual or multimodal_audio.
            embeddings: (some, D) local embeddings that candidates are taken from.
            candidates: (predicted positions, candidates) indices into them.

        Returns:
            (predicted positions, candidates) float32 logits.
        """
        modality = VISUAL if predictor.endswith("visual") else AUDIO
        tokens = {"visual": seen.tokens.visual_tokens, "audio": seen.tokens.audio_tokens}.get(predictor)
        if tokens is None:
            assert seen.tokens.multimodal_tokens is not None
            tokens = seen.tokens.multimodal_tokens.chunk(2, 1)[modality]
        outputs = tokens[:, 1:][seen.predicted[modality]]
        head = self.predictors[predictor]
        assert isinstance(head, Predictor)
        prediction, projected = head(outputs, embeddings)
        with torch.autocast(outputs.device.type, enabled=False):
            # All products, then a choice: no copies of its candidates for every position.
            products: Tensor = prediction.float() @ projected.float().mT
            return products.gather(1, candidates)

    def pair_logits(self, seen: MaskedPass) -> Tensor:
        """The pair classifier at every time.

        The paper takes one random time of each clip. The mean over all times is what that is on average, and a batch
        says fifteen times as much.

        Returns:
            (batch, segments) float32 logits, positive for "same video"; `seen.both` tells which count.
        """
        assert seen.tokens.multimodal_tokens is not None
        logits: Tensor = self.pair(seen.tokens.multimodal_tokens)[..., 0].float()
        return logits


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


def masked_positions(present: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Which segments are hidden: each present one with probability `rate`, of a clip with two or more at least one and
    not all; a clip with one segment has no context to predict it from.

    Args:
        present: (batch, segments) boolean.

    Returns:
        (batch, segments) boolean.
    """
    draw = torch.rand(present.shape, generator=generator).to(present.device)
    lowest = draw == draw.masked_fill(~present, 2).amin(1, keepdim=True)
    highest = draw == draw.masked_fill(~present, -1).amax(1, keepdim=True)
    return present & ((draw < rate) | lowest) & ~highest


def wrong_sounds(eligible: Tensor, draws: int, generator: torch.Generator) -> list[Tensor]:
    """Whose sound each clip gets: half of the eligible clips get one another's in a ring.

    One of two or three clips could only get its own sound: there two are exchanged in every second draw, beginning
    with the first or not by chance. So a single draw has a right or a wrong pair, and two or more have both.

    Args:
        eligible: (batch,) boolean, clips that have both modalities.
        draws: how often.

    Returns:
        For each draw, (batch,) clip numbers.
    """
    clips = eligible.nonzero().squeeze(1)
    parity = int(torch.randint(2, (), generator=generator))
    sounds = []
    for draw in range(draws):
        few = 2 if len(clips) >= 2 and (draw + parity) % 2 else 0
        order = torch.randperm(len(clips), generator=generator).to(clips.device)
        chosen = clips[order[:len(clips) // 2 if len(clips) >= 4 else few]]
        sound_of = torch.arange(len(eligible), device=eligible.device)
        sound_of[chosen] = chosen.roll(1)
        sounds.append(sound_of)
    return sounds


def _index_among(some: Tensor, all_of: Tensor) -> Tensor:
    """Where the positions of mask `some`, of one or more copies of a batch, stand in the list of those of `all_of`."""
    numbers = all_of.flatten().cumsum(0).view_as(all_of) - 1
    return numbers.repeat(len(some) // len(all_of), 1)[some]


def _mean_over_times(values: Tensor, counts: Tensor) -> Tensor:
    """(batch, segments) -> the mean over clips of their means over the times that count; clips without one are out."""
    times = counts.sum(1)
    return (torch.where(counts, values, 0).sum(1) / times.clamp(min=1))[times > 0].mean()


def _nce(logits: Tensor) -> Tensor:
    """- mean log of the true candidate's share; it is the first of (positions, candidates)."""
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))
