"""Where nothing can be predicted, pretraining stays at chance; and where one thing can be, it is found.

What gives the answer away without anything being learned of the clips (a BatchNorm over few segments, lengths that tell
which sound was exchanged) shows here: as masked top-1 or pair accuracy over chance, in training or on held-out clips.
"""

import made_up
import pytest

MICRO_BATCHES = ("training.micro_batch=4",)
PAPER = ("model.visual_width=4", "model.audio_width=4")  # its CNNs have 16 blocks
RECOMPUTED = ("model.stages_recomputed=9",)

# For `make test`: a shallow network, and what gives most away. Of two segments the other is all there is to go by: a
# BatchNorm that sees the two alone is found in 60 steps. Pairs of any lengths are found in 80 where pairs count most.
SHALLOW = ("model.visual_blocks=[1,1]", "model.audio_blocks=[1,1]", "model.layers=1")
TWO = (*SHALLOW, "data.segments=2", "objectives.mask_rate=0.5")
PAIRS = (*SHALLOW, *(f"objectives.mep_{name}=0.1" for name in ("visual", "audio", "multimodal")))
QUICK = {
    "two segments": (made_up.noise, TWO),
    "two segments, twice": (made_up.twice, TWO),
    "of all lengths": (made_up.of_all_lengths, PAIRS),
    "two segments, in parts": (made_up.noise, (*TWO, "training.micro_batch=8")),
    "lacking sound or picture": (made_up.lacking, PAIRS),
    "of few sources": (made_up.of_few_sources, PAIRS),
}

# One thing at a time, of clips of noise.
DIMENSIONS = {
    "sound": {"preset": "sound"},
    "small": {"preset": "small", "settings": PAPER},
    "paper": {"preset": "paper", "settings": PAPER},
    "slowfast": {"settings": ("model.visual=slowfast50", "data.segment_frames=8")},
    "early": {"settings": ("model.fusion=early",)},
    "late": {"settings": ("model.fusion=late",)},
    "own layers": {"settings": ("model.share_layers=false",)},
    "own Transformers": {"settings": ("model.share_transformers=false",)},
    "no rank": {"settings": ("model.rank=none",)},
    "dropout": {"settings": ("model.dropout=0.1",)},
    "random": {"settings": ("objectives.sampling=random",)},
    "dissimilar": {"settings": ("objectives.sampling=dissimilar",)},
    "middle half": {"settings": ("objectives.keep_percent=50",)},
    "few negatives": {"settings": ("objectives.negatives=4",)},
    "more negatives than there are": {"settings": ("objectives.negatives=200",)},
    "half hidden": {"settings": ("objectives.mask_rate=0.5",)},
    "one draw": {"settings": ("objectives.draws=1",)},
    "no pairs": {"settings": ("objectives.pair=0",)},
    "pairs alone": {"settings": tuple(f"objectives.mep_{name}=0" for name in ("visual", "audio", "multimodal"))},
    "pictures alone": {"settings": ("data.modality=visual",)},
    "two segments": {"settings": ("data.segments=2",)},
    "bfloat16": {"precision": "bfloat16"},
    "first stage recomputed": {"settings": ("model.stages_recomputed=1",)},
    "all stages recomputed": {"settings": RECOMPUTED},
    "parts of two clips": {"settings": ("training.batch_size=8", "training.micro_batch=2")},
    "parts of four clips": {"settings": MICRO_BATCHES},
}

# Kinds of clips, and what is known to act together.
TOGETHER = {
    "of all lengths": (made_up.of_all_lengths, {}),
    "lacking": (made_up.lacking, {}),
    "of few sources": (made_up.of_few_sources, {}),
    "twice": (made_up.twice, {}),
    "of all lengths, in small parts": (made_up.of_all_lengths, {"settings": MICRO_BATCHES}),
    "of all lengths, bfloat16": (made_up.of_all_lengths, {"precision": "bfloat16"}),
    "of all lengths, early": (made_up.of_all_lengths, {"settings": ("model.fusion=early",)}),
    "lacking, in parts": (made_up.lacking, {"settings": ("training.micro_batch=8",)}),
    "lacking, early": (made_up.lacking, {"settings": ("model.fusion=early",)}),
    "lacking, late": (made_up.lacking, {"settings": ("model.fusion=late",)}),
    "lacking, all recomputed": (made_up.lacking, {"settings": RECOMPUTED}),
    "of few sources, in parts": (made_up.of_few_sources, {"settings": MICRO_BATCHES}),
    "twice, random": (made_up.twice, {"settings": ("objectives.sampling=random",)}),
    "twice, dissimilar": (made_up.twice, {"settings": ("objectives.sampling=dissimilar",)}),
    "twice, in parts": (made_up.twice, {"settings": MICRO_BATCHES}),
    "recomputed in parts, bfloat16": (made_up.noise, {"settings": RECOMPUTED + MICRO_BATCHES,
                                                      "precision": "bfloat16"}),
    "everything": (made_up.everything, {}),
    "everything, paper": (made_up.everything, {"preset": "paper", "settings": PAPER}),
}
SLOW = {name: (made_up.noise, options) for name, options in DIMENSIONS.items()} | TOGETHER


def _stays_at_chance(folder, make, options, steps):
    """By chance alone, one figure in 700 is over three standard errors: what is, must be so with another seed too."""
    first = made_up.pretrained(folder / "first", make, steps, 0, **options).exceeding()
    if first:
        again = made_up.pretrained(folder / "again", make, steps, 1, **options).exceeding()
        assert not first.keys() & again.keys(), (first, again)


@pytest.mark.seconds
@pytest.mark.parametrize("case", QUICK)
def test_nothing_is_found_where_there_is_nothing(tmp_path, case):
    make, settings = QUICK[case]
    _stays_at_chance(tmp_path, make, {"settings": settings}, steps=80 if case == "of all lengths" else 60)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_nothing_is_found_whatever_the_settings(tmp_path, case):
    _stays_at_chance(tmp_path, *SLOW[case], steps=200)


@pytest.mark.slow
def test_what_stands_still_is_found(tmp_path):
    """The next segment repeats the last: what is hidden is seen in the clip."""
    found = made_up.pretrained(tmp_path, made_up.still, 200)
    figures = [f"{name}{modality}" for name in ("", "multimodal_") for modality in ("visual", "audio")]
    exceeding = found.exceeding()
    for name in figures:
        assert f"held-out test_masked_top1_{name}" in exceeding, exceeding
        assert found.held_out[f"test_masked_top1_{name}"][0] > 0.2, found.held_out
    assert "held-out test_pair_accuracy" not in exceeding


@pytest.mark.slow
def test_the_picture_that_a_sound_names_is_found(tmp_path):
    """Three of four pairs can be told: of wrong ones every second looks right."""
    found = made_up.pretrained(tmp_path, made_up.named_by_sound, 200)
    assert {"pair_accuracy", "held-out test_pair_accuracy"} <= found.exceeding().keys()
    assert float(found.excess["pair_accuracy"].mean()) > 0.15 and found.held_out["test_pair_accuracy"][0] > 0.65
