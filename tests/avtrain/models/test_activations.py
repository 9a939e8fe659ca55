"""The presets fit: bytes that a step keeps, counted, against those of cards and what an H100 took."""

from functools import cache

import pytest

from avtrain.config import read_config
from benchmarks.activations import counted

GB = 1e9 / 2**30
SHARE = 0.8  # of a card, for what the count leaves out: workspaces, gradients of maps, fragments, batches on their way


@cache
def steps(preset):
    return counted(read_config(preset))


@pytest.mark.seconds
@pytest.mark.parametrize(("preset", "card_gb"), [("paper", 80), ("small", 24)])
def test_presets_fit(preset, card_gb):
    config = read_config(preset)
    clips = config.training.micro_batch
    step = steps(preset)[config.model.stages_recomputed]
    assert step.gib(clips, config.data.segments) <= SHARE * card_gb * GB
    assert step.gib(8 * clips, config.data.segments) > card_gb * GB  # the bound says something


@pytest.mark.parametrize(("clips", "measured_gib"), [(16, 44.8), (24, 66.5)])
def test_the_count_is_what_an_h100_took(clips, measured_gib):
    assert steps("paper")[0].gib(clips, 15) == pytest.approx(measured_gib, rel=0.05)


def test_stages_that_run_again_keep_less():
    paper = steps("paper")
    segments = [step.segment for step in paper]
    assert segments == sorted(segments, reverse=True) and len(segments) == 5
    assert segments[1] < 0.7 * segments[0] and segments[2] < 0.55 * segments[0]
    assert [step.clip for step in paper] == [paper[0].clip] * 5
