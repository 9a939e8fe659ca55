"""What is random about a batch, drawn on the host: masks, pairs, and the lists of positions that follow from them.

All sizes are known here, so nothing on the device is waited for. A number depends on (seed, step, a clip's place in the
global batch) alone, so it is the same for any number of processes and parts.

Lists of two are (visual, audio). A position is clip * segments + segment; rows are those of `draws` copies of the
batch one after the other, and a row's position counts through all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from avtrain.config import Config
from avtrain.data.loader import Batch
from avtrain.data.manifest import video_of
from avtrain.pretraining.noise import hashed, uniforms

_MASK, _NEGATIVE, _ORDER, _SWAP = range(4)  # what a number is for


class Predicted(NamedTuple):
    """The masked segments of one modality that are to be predicted, in the order of their rows' positions.

    Attributes:
        outputs: (n,) int64, their positions in the rows of the single-modality Transformer.
        targets: (n,) int64, which of the present segments each is, a number into `Draw.here`.
        noise: (n,) int64, the hash that its negatives are drawn with.
        joint: (k,) int64, which of the n the multimodal Transformer predicts too: not those of wrong pairs.
    """

    outputs: Tensor
    targets: Tensor
    noise: Tensor
    joint: Tensor


class Pairs(NamedTuple):
    """Which sound goes with which picture.

    Attributes:
        sound_of: (rows,) int64, the row whose sound each row gets.
        right: (rows,) boolean, whether that is its own.
        divisors: (rows, segments) int64: each time counts for one part in so many, in the mean over clips of the mean
            over the times that have both picture and sound. 0: not at all, as all times of clips without a partner.
    """

    sound_of: Tensor
    right: Tensor
    divisors: Tensor


@dataclass(frozen=True)
class Draw:
    """What was drawn for a batch.

    Attributes:
        draws: copies of the batch, each with masks and pairs of its own.
        here: (present,) int64, positions of the present segments.
        places: (present,) int64, what these segments are called in the global batch.
        masks: (rows, segments) boolean, the hidden segments of each row's own clip.
        present: (rows, segments) boolean: picture of the row's clip, sound of the clip whose sound it gets.
        predicted: what is predicted.
        pairs: which sound each row gets.
        judged: whether any pair counts.
    """

    draws: int
    here: tuple[Tensor, Tensor]
    places: tuple[Tensor, Tensor]
    masks: tuple[Tensor, Tensor]
    present: tuple[Tensor, Tensor]
    predicted: tuple[Predicted, Predicted]
    pairs: Pairs
    judged: bool

    def to(self, device: torch.device) -> Draw:
        """The same on the device; nothing is waited for."""
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        def both(two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return moved(two[0]), moved(two[1])

        visual, audio = (Predicted(*map(moved, predicted)) for predicted in self.predicted)
        return Draw(self.draws, both(self.here), both(self.places), both(self.masks), both(self.present),
                    (visual, audio), Pairs(*map(moved, self.pairs)), self.judged)


def draw_for(batch: Batch, config: Config, part: int, seed: int, step: int, own_sounds: bool = False) -> Draw:
    """Masks and pairs of the part of that number of a step's batch.

    Args:
        own_sounds: every clip keeps its own, and all is drawn once.
    """
    training, objectives = config.training, config.objectives
    first = part * (training.batch_size // training.accumulate)
    pairs = objectives.pair > 0 and config.model.fusion != "late" and not own_sounds
    return drawn(batch.visual_present, batch.audio_present, [video_of(key) for key in batch.keys],
                 [first + place for place in batch.places], seed, step, objectives.mask_rate,
                 1 if own_sounds else objectives.draws, pairs)


def drawn(visual_present: Tensor, audio_present: Tensor, sources: Sequence[str], places: Sequence[int], seed: int,
          step: int, mask_rate: float, draws: int = 1, pairs: bool = True) -> Draw:
    """Draw masks and pairs for a batch.

    Args:
        visual_present, audio_present: (clips, segments) boolean, on the host.
        sources: of each clip; the sounds of two clips of one source are never exchanged.
        places: of each clip in the global batch.
        seed, step: of the run.
        mask_rate: see `masked_positions`.
        draws: how often.
        pairs: exchange sounds; False: every clip keeps its own, and no pair is judged.
    """
    present = (visual_present, audio_present)
    clips, segments = visual_present.shape
    at, of_draw = torch.tensor(places, dtype=torch.int64), torch.arange(draws)[:, None]
    named = at[:, None] * segments + torch.arange(segments)  # (clips, segments), every segment's place
    masks = [masked_positions(there, mask_rate, hashed(seed, step, _MASK, modality, of_draw[..., None], named))
             for modality, there in enumerate(present)]
    order, swaps = (hashed(seed, step, purpose, of_draw, at) for purpose in (_ORDER, _SWAP))
    partners = [exchanged(visual_present, audio_present, sources, order[draw], swaps[draw]) if pairs else None
                for draw in range(draws)]
    itself = torch.arange(draws * clips)
    sound_of, judged = itself.clone(), torch.zeros(draws * clips, dtype=torch.bool)
    for draw, found in enumerate(partners):
        if found is not None:
            rows = slice(draw * clips, (draw + 1) * clips)
            sound_of[rows], judged[rows] = found[0] + draw * clips, found[1]
    right = sound_of == itself
    flat = [mask.flatten(0, 1) for mask in masks]
    here = [there.flatten().nonzero().squeeze(1) for there in present]
    seen, heard = visual_present.repeat(draws, 1), audio_present.repeat(draws, 1)[sound_of]
    predicted = []
    for modality, rows_own in enumerate((itself, sound_of)):
        hidden = flat[modality][rows_own].nonzero()  # (n, 2): row, segment
        clip = rows_own[hidden[:, 0]] % max(1, clips)
        number = present[modality].flatten().cumsum(0) - 1
        noise = hashed(seed, step, _NEGATIVE, modality, hidden[:, 0] // max(1, clips), named[clip, hidden[:, 1]])
        outputs, own = hidden[:, 0] * segments + hidden[:, 1], clip * segments + hidden[:, 1]
        joint = right[hidden[:, 0]].nonzero().squeeze(1)
        predicted.append(Predicted(outputs, number[own], noise, joint))
    names = [named.flatten()[positions] for positions in here]
    counts = seen & heard & judged[:, None]
    return Draw(draws, (here[0], here[1]), (names[0], names[1]), (flat[0], flat[1]), (seen, heard),
                (predicted[0], predicted[1]), Pairs(sound_of, right, _divisors(counts)), bool(counts.any()))


def masked_positions(present: Tensor, rate: float, hashes: Tensor) -> Tensor:
    """Which segments are hidden: each present one with probability `rate`, of a clip with two or more at least one and
    not all; a clip with one segment has no context to predict it from.

    Args:
        present: (batch, segments) boolean.
        hashes: (draws, batch, segments) int64.

    Returns:
        (draws, batch, segments) boolean.
    """
    draw = uniforms(hashes, torch.float64)
    lowest = draw == draw.masked_fill(~present, 2).amin(-1, keepdim=True)
    highest = draw == draw.masked_fill(~present, -1).amax(-1, keepdim=True)
    return present & ((draw < rate) | lowest) & ~highest


def exchanged(visual_present: Tensor, audio_present: Tensor, sources: Sequence[str], order: Tensor,
              swaps: Tensor) -> tuple[Tensor, Tensor]:
    """Whose sound each clip gets. Partners exchange their sounds in every second draw, by chance.

    Partners have the same segments, so that presence and length tell nothing of right and wrong, and are of different
    sources. So every clip that has a partner gets another's sound in half of the draws, however many there are.

    Args:
        visual_present, audio_present: (clips, segments) boolean; who lacks sound or picture has no partner.
        sources: of each clip.
        order, swaps: (clips,) int64 hashes: who may find whom, and who exchanges.

    Returns:
        (clips,) int64 clip numbers, and (clips,) boolean, who has a partner.
    """
    sound_of, judged = torch.arange(len(sources)), torch.zeros(len(sources), dtype=torch.bool)
    groups: dict[tuple[bytes, bytes], list[int]] = defaultdict(list)
    both = (visual_present.any(1) & audio_present.any(1)).tolist()
    for clip in (clip for clip in order.argsort().tolist() if both[clip]):
        groups[visual_present[clip].numpy().tobytes(), audio_present[clip].numpy().tobytes()].append(clip)
    for group in groups.values():
        for one, other in _partners(group, sources):
            judged[one] = judged[other] = True
            if int(swaps[min(one, other)]) & 1:
                sound_of[one], sound_of[other] = other, one
    return sound_of, judged


def _partners(clips: list[int], sources: Sequence[str]) -> list[tuple[int, int]]:
    """Clips, already in random order, two by two, each time of two sources; as many as there can be."""
    of_source: dict[str, list[int]] = defaultdict(list)
    for clip in clips:
        of_source[sources[clip]].append(clip)
    by_source = sorted(of_source.values(), key=len, reverse=True)
    if len(clips) % 2:
        by_source[0] = by_source[0][1:]  # one stays alone: of the source that has the most
    line = [clip for same in by_source for clip in same]
    half = len(line) // 2
    return [(one, other) for one, other in zip(line[:half], line[half:], strict=True)
            if sources[one] != sources[other]]


def _divisors(counts: Tensor) -> Tensor:
    """(rows, segments) boolean -> times of the row, times rows that have any; 0 where a time does not count."""
    times = counts.sum(1, keepdim=True)
    return counts * times * (times > 0).sum()
