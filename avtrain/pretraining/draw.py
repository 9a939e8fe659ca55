"""What is random about a step's batch, drawn on the host: masks, pairs, and the lists of positions that follow.

All is drawn from what the manifest says of the clips, before any of them is read: all sizes are known, so nothing on
the device is waited for, and every mean can be over the whole batch, however many parts and processes it is computed
in. A number depends on (seed, step, a clip's place in the batch of all processes) alone.

What is chosen among is a group of clips: a part of the batch, of all processes or of one. Each process computes its own
clips of it. Lists of two are (visual, audio). A position is clip * segments + segment, where clips count through the
group; rows are those of `draws` copies of this process's clips, one after the other, and a row's position counts
through all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from avtrain.config import ObjectivesConfig
from avtrain.data.clips import ClipDataset
from avtrain.data.order import Cut, Wanted
from avtrain.pretraining.noise import hashed, uniforms

_MASK, _NEGATIVE, _ORDER, _SWAP = range(4)  # what a number is for


class Clips(NamedTuple):
    """Clips, as their manifest has them.

    Attributes:
        visual_present, audio_present: (clips, segments) boolean, on the host.
        sources: of each clip; the sounds of two clips of one source are never exchanged.
    """

    visual_present: Tensor
    audio_present: Tensor
    sources: Sequence[str]

    def of(self, some: slice) -> Clips:
        """Some of them."""
        return Clips(self.visual_present[some], self.audio_present[some], self.sources[some])


class Predicted(NamedTuple):
    """The masked segments of one modality that are to be predicted, in the order of their rows' positions.

    Attributes:
        outputs: (n,) int64, their positions in the rows of the single-modality Transformer.
        targets: (n,) int64, which of the group's segments each is, a number into `Draw.here`.
        clips: (n,) int64, the clip that each is of.
        noise: (n,) int64, the hash that its negatives are drawn with.
        joint: (k,) int64, which of the n the multimodal Transformer predicts too: not those of wrong pairs.
    """

    outputs: Tensor
    targets: Tensor
    clips: Tensor
    noise: Tensor
    joint: Tensor


class Pairs(NamedTuple):
    """Which sound goes with which picture.

    Attributes:
        clips: (rows,) int64, the clip of each row's picture.
        sound_of: (rows,) int64, the clip whose sound the row gets.
        right: (rows,) boolean, whether that is its own.
        divisors: (rows, segments) int64: each time counts for one part in so many, in the mean over the batch's clips
            of the mean over the times that have both picture and sound. 0: not at all, as all times of clips without
            a partner.
    """

    clips: Tensor
    sound_of: Tensor
    right: Tensor
    divisors: Tensor


@dataclass(frozen=True)
class Counts:
    """What a batch has, in all its parts and of all processes: what the sums of the loss are divided by.

    Attributes:
        predicted: (visual, audio) segments that are to be predicted by the single-modality Transformers.
        joint: the same by the multimodal one.
        pairs: rows whose pairs are judged.
        right: those of them that keep their own sound.
    """

    predicted: tuple[int, int] = (0, 0)
    joint: tuple[int, int] = (0, 0)
    pairs: int = 0
    right: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts((self.predicted[0] + other.predicted[0], self.predicted[1] + other.predicted[1]),
                      (self.joint[0] + other.joint[0], self.joint[1] + other.joint[1]), self.pairs + other.pairs,
                      self.right + other.right)


@dataclass(frozen=True)
class Draw:
    """What was drawn for a process's clips of a group.

    Attributes:
        draws: copies of the clips, each with masks and pairs of its own.
        shared: whether other processes compute the rest of the group.
        here: (present,) int64, positions of the group's present segments.
        places: (present,) int64, what these segments are called in the batch.
        masks: (rows, segments) boolean, the hidden segments of each row's picture, and of its sound.
        present: (rows, segments) boolean, the present ones.
        predicted: what is predicted.
        pairs: which sound each row gets.
        counts: of the batch.
    """

    draws: int
    shared: bool
    here: tuple[Tensor, Tensor]
    places: tuple[Tensor, Tensor]
    masks: tuple[Tensor, Tensor]
    present: tuple[Tensor, Tensor]
    predicted: tuple[Predicted, Predicted]
    pairs: Pairs
    counts: Counts

    @property
    def judged(self) -> bool:
        """Whether any pair of the batch counts."""
        return self.counts.pairs > 0

    def to(self, device: torch.device) -> Draw:
        """The same on the device; nothing is waited for."""
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        def both(two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return moved(two[0]), moved(two[1])

        visual, audio = (Predicted(*map(moved, predicted)) for predicted in self.predicted)
        return Draw(self.draws, self.shared, both(self.here), both(self.places), both(self.masks), both(self.present),
                    (visual, audio), Pairs(*map(moved, self.pairs)), self.counts)


def planned(dataset: ClipDataset, wanted: Sequence[Wanted]) -> Clips:
    """What the manifest says of these clips."""
    visual, audio = torch.from_numpy(np.stack([dataset.presence(one) for one in wanted], 1))
    return Clips(visual, audio, [dataset.folder.rows.at(one.place).video for one in wanted])


def draws_of(batch: Clips, cut: Cut, config: ObjectivesConfig, seed: int, step: int, pairs: bool) -> list[Draw]:
    """What this process computes of a step: a draw for each of its parts.

    Args:
        batch: the clips of all processes.
        cut: how they are divided.
        config: rates, copies, and whom sounds and negatives come from.
        seed, step: of the run.
        pairs: see `drawn`.
    """
    shared = cut.ranks > 1 and config.negatives_from == "global"
    size = cut.at_once if shared else cut.micro_batch
    own = slice(cut.rank * cut.micro_batch, (cut.rank + 1) * cut.micro_batch) if shared else slice(0, size)
    groups = [_Group(batch.of(slice(first, first + size)), range(first, first + size), seed, step, config.mask_rate,
                     config.draws, pairs) for first in range(0, cut.batch_size, size)]
    counts = sum((group.counts for group in groups), Counts())
    mine = groups if shared else groups[cut.rank::cut.ranks]
    return [group.draw(own, counts, shared) for group in mine]


def drawn(clips: Clips, places: Sequence[int], seed: int, step: int, mask_rate: float, draws: int = 1,
          pairs: bool = True) -> Draw:
    """Draw masks and pairs for clips that one process computes, and that are all there is of the batch.

    Args:
        clips: what is there of them.
        places: of each clip in the batch.
        seed, step: of the run.
        mask_rate: see `masked_positions`.
        draws: how often.
        pairs: exchange sounds; False: every clip keeps its own, and no pair is judged.
    """
    group = _Group(clips, places, seed, step, mask_rate, draws, pairs)
    return group.draw(slice(0, len(places)), group.counts)


class _Group:
    """Masks and pairs of all clips that are chosen among: see `drawn`."""

    def __init__(self, clips: Clips, places: Sequence[int], seed: int, step: int, mask_rate: float, draws: int,
                 pairs: bool) -> None:
        visual_present, audio_present, sources = clips
        self._present, self._draws = (visual_present, audio_present), draws
        self._clips, self._segments = visual_present.shape
        at, of_draw = torch.tensor(places, dtype=torch.int64), torch.arange(draws)[:, None]
        # (clips, segments), every segment's place
        self._named = at[:, None] * self._segments + torch.arange(self._segments)
        self._noise = [hashed(seed, step, _NEGATIVE, modality, of_draw[..., None], self._named) for modality in (0, 1)]
        self._masks = [masked_positions(there, mask_rate, hashed(seed, step, _MASK, modality, of_draw[..., None],
                                                                 self._named))
                       for modality, there in enumerate(self._present)]  # (draws, clips, segments)
        self._sound_of = torch.arange(self._clips).repeat(draws, 1)  # (draws, clips)
        judged = torch.zeros(draws, self._clips, dtype=torch.bool)
        if pairs:
            orders, swaps = (hashed(seed, step, purpose, of_draw, at) for purpose in (_ORDER, _SWAP))
            for draw in range(draws):
                self._sound_of[draw], judged[draw] = exchanged(visual_present, audio_present, sources, orders[draw],
                                                               swaps[draw])
        self._right = self._sound_of == torch.arange(self._clips)
        self._judged = visual_present & audio_present[self._sound_of] & judged[..., None]  # (draws, clips, segments)
        hidden = [mask.sum(2) for mask in self._masks]
        counted = self._judged.any(2)
        self.counts = Counts((int(hidden[0].sum()), int(hidden[1].sum())),
                             (int(hidden[0][self._right].sum()), int(hidden[1][self._right].sum())),
                             int(counted.sum()), int((counted & self._right).sum()))

    def draw(self, own: slice, counts: Counts, shared: bool = False) -> Draw:
        """What a process gets that computes these of the clips, of a batch with so many of everything."""
        rows = torch.arange(self._clips)[own].repeat(self._draws)
        of_draw = torch.arange(self._draws).repeat_interleave(len(rows) // max(1, self._draws))
        sound_of, right = self._sound_of[of_draw, rows], self._right[of_draw, rows]
        here = [there.flatten().nonzero().squeeze(1) for there in self._present]
        masks, present, predicted = [], [], []
        for modality, clips in enumerate((rows, sound_of)):
            masks.append(self._masks[modality][of_draw, clips])
            present.append(self._present[modality][clips])
            row, segment = masks[-1].nonzero(as_tuple=True)
            clip, number = clips[row], self._present[modality].flatten().cumsum(0) - 1
            predicted.append(Predicted(row * self._segments + segment, number[clip * self._segments + segment], clip,
                                       self._noise[modality][of_draw[row], clip, segment],
                                       right[row].nonzero().squeeze(1)))
        names = [self._named.flatten()[positions] for positions in here]
        times = self._judged[of_draw, rows]
        divisors = times * times.sum(1, keepdim=True) * counts.pairs
        return Draw(self._draws, shared, (here[0], here[1]), (names[0], names[1]), (masks[0], masks[1]),
                    (present[0], present[1]), (predicted[0], predicted[1]),
                    Pairs(rows, sound_of, right, divisors), counts)


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
