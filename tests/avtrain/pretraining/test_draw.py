"""Masks and pairs: their stated shares, and what they must not tell."""

from collections import Counter

import pytest
import torch

from avtrain.pretraining.draw import Clips, drawn
from avtrain.pretraining.noise import hashed, uniforms


def _drawn(visual, audio, sources=None, step=0, seed=0, places=None, **options):
    sources = sources or [f"video{clip}" for clip in range(len(visual))]
    return drawn(Clips(visual, audio, sources), places or range(len(visual)), seed, step,
                 options.pop("mask_rate", 0.15), **options)


def _full(clips, segments=5):
    return torch.ones(clips, segments, dtype=torch.bool)


def test_hashes_are_those_of_plain_integers():
    """Against the finaliser of SplitMix64 in Python's own integers."""
    def plain(*names):
        mixed, all_bits = 0, (1 << 64) - 1
        for name in names:
            z = (3 * mixed + name + 0x9E3779B97F4A7C15) & all_bits
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & all_bits
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & all_bits
            mixed = z ^ (z >> 31)
        return mixed

    for names in [(0,), (1, 2, 3), (2**32 - 1, 220_000, 5, 3839)]:
        assert int(hashed(*names)) % 2**64 == plain(*names)
        assert float(uniforms(hashed(*names), torch.float64)) == pytest.approx(plain(*names) / 2**64, abs=2**-53)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_uniform_and_neighbours_have_nothing_in_common(dtype):
    numbers = uniforms(hashed(3, torch.arange(500)[:, None], torch.arange(500)), dtype)
    assert 0 < numbers.min() and numbers.max() < 1
    counts = torch.histc(numbers.float(), 100, 0, 1)
    assert float(((counts - 2500) ** 2 / 2500).sum()) < 149  # chi-square of 99 degrees, 0.1 %
    for one, other in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1]), (numbers, numbers.T)):
        both = torch.stack((one.flatten(), other.flatten()))
        assert abs(float(torch.corrcoef(both)[0, 1])) < (0.01 if one.shape != (500, 500) else 0.02)


def test_masks_hide_the_stated_share_and_leave_context():
    present = _full(4000, 15)
    present[::2, 8:] = False
    present[:100] = False
    present[100:200, 1:] = False
    hidden = _drawn(present, present).masks[0]
    assert not hidden[:200].any() and not (hidden & ~present).any()  # nothing to predict one segment from
    assert (hidden[200:].sum(1) >= 1).all() and (hidden[200:].sum(1) < present[200:].sum(1)).all()
    full = hidden[201::2].float().mean()
    assert 0.15 <= full < 0.17  # a little over the rate: at least one of 15


def test_what_is_drawn_depends_on_seed_step_draw_and_place_alone():
    """So it is the same for any parts and processes that share a batch."""
    present = _full(8)
    present[2, 3:] = False
    whole = _drawn(present, present, draws=2, pairs=False)
    for part in (range(4), range(4, 8), [5], [6, 1]):
        places = list(part)
        alone = _drawn(present[places], present[places], draws=2, places=places, pairs=False)
        for modality in (0, 1):
            masks = whole.masks[modality].view(2, 8, 5)
            assert torch.equal(alone.masks[modality].view(2, len(places), 5), masks[:, places])
            noise = dict(zip(whole.predicted[modality].outputs.tolist(), whole.predicted[modality].noise.tolist(),
                             strict=True))
            for output, own in zip(alone.predicted[modality].outputs.tolist(),
                                   alone.predicted[modality].noise.tolist(), strict=True):
                draw, clip, segment = output // 5 // len(places), places[output // 5 % len(places)], output % 5
                assert noise[(draw * 8 + clip) * 5 + segment] == own
    first, *others = (_drawn(present, present, **named).masks[0] for named in ({}, {"step": 1}, {"seed": 1}))
    assert all(not torch.equal(first, other) for other in others)
    again, later = (_drawn(present, present, step=step, mask_rate=0.999).predicted[0] for step in (0, 1))
    assert not set(again.noise.tolist()) & set(later.noise.tolist())  # nor the same negatives
    assert not torch.equal(*whole.masks[0].view(2, 8, 5)) and not torch.equal(whole.masks[0], whole.masks[1])


@pytest.mark.parametrize("clips", [2, 3, 4, 9])
def test_half_of_the_clips_get_anothers_sound_whatever_their_number(clips):
    present = _full(clips + 3)
    audio, visual = present.clone(), present.clone()
    audio[0], visual[1], audio[2, 3:], visual[2, 3:] = False, False, False, False  # no sound, no picture, short
    wrong = torch.zeros(clips + 3)
    judged = torch.zeros(clips + 3)
    for step in range(400):
        draw = _drawn(visual, audio, step=step)
        assert sorted(draw.pairs.sound_of.tolist()) == list(range(clips + 3))
        counted = draw.pairs.divisors.amax(1) > 0
        assert (counted | draw.pairs.right).all() and int(counted.sum()) == clips // 2 * 2
        wrong, judged = wrong + ~draw.pairs.right, judged + counted
    assert (wrong[:3] == 0).all() and (judged[:3] == 0).all()
    assert (wrong[3:] / judged[3:] - 0.5).abs().max() < 0.1  # four standard errors
    assert (judged[3:] / 400 - clips // 2 * 2 / clips).abs().max() < 0.1


def test_presence_and_length_tell_nothing_of_right_and_wrong():
    """A table of how often each pattern is right: the best guess from it is at 50 %."""
    lengths = [5, 5, 5, 4, 4, 3, 2, 2, 2, 2, 1]
    visual = torch.arange(5) < torch.tensor(lengths)[:, None]
    audio = visual.clone()
    audio[1, 0] = audio[7, 0] = False
    seen: Counter = Counter()
    for step in range(600):
        draw = _drawn(visual, audio, step=step)
        for row, right in enumerate(draw.pairs.right.tolist()):
            if draw.pairs.divisors[row].any():
                heard = draw.present[1][row]
                seen[(*visual[row].tolist(), *heard.tolist()), right] += 1
    patterns = {pattern for pattern, _ in seen}
    total = sum(seen.values())
    best = sum(max(seen[pattern, True], seen[pattern, False]) for pattern in patterns) / total
    assert 0.5 <= best < 0.53 and len(patterns) >= 3


def test_sounds_of_one_source_are_never_exchanged():
    sources = ["a", "a", "a", "a", "b", "c", "c"]
    judged = torch.zeros(7)
    for step in range(300):
        draw = _drawn(_full(7), _full(7), sources, step=step)
        for row, sound in enumerate(draw.pairs.sound_of.tolist()):
            assert sound == row or sources[row] != sources[sound]
        judged += draw.pairs.divisors.amax(1) > 0
    assert (judged > 150).all()  # as many partners as there can be: three of four, and three
    alone = _drawn(_full(3), _full(3), ["a", "a", "a"])
    assert alone.pairs.right.all() and not alone.judged and not alone.pairs.divisors.any()


def test_draws_mask_and_pair_the_same_clips_differently():
    draw = _drawn(_full(8), _full(8), draws=3)
    right, masks = draw.pairs.right.view(3, 8), draw.masks[0].view(3, 8, 5)
    assert not torch.equal(right[0], right[1]) or not torch.equal(right[1], right[2])
    assert not torch.equal(masks[0], masks[1])
    assert draw.pairs.sound_of.view(3, 8).sort(1).values.tolist() == [list(range(8))] * 3  # in every copy, each once
    kept = _drawn(_full(8), _full(8), draws=3, pairs=False)
    assert kept.pairs.right.all() and not kept.judged


def test_each_row_counts_alike_and_each_of_its_times():
    visual, audio = _full(4), _full(4)
    visual[2:, 2:] = audio[2:, 2:] = False
    divisors = _drawn(visual, audio).pairs.divisors
    weights = torch.where(divisors > 0, 1 / divisors, 0)
    assert torch.allclose(weights.sum(1), torch.full((4,), 0.25)) and (weights[2, :2] == 0.125).all()
