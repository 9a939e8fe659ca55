"""The losses against plain loops, chance, and what must not matter; negatives against their stated probabilities."""

import math

import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from avtrain.config import ModelConfig, ObjectivesConfig
from avtrain.models.avbert import AVBert
from avtrain.pretraining.negatives import sample_negatives, sampling_weights
from avtrain.pretraining.objectives import Objectives, masked_positions, wrong_sounds

SMALL = {"visual_width": 4, "visual_blocks": (1,), "audio_width": 4, "audio_blocks": (1,), "audio_stem_stride": 4,
         "dimension": 16, "layers": 1, "heads": 2, "feedforward": 32, "rank": 4, "dropout": 0.0, "max_segments": 6}


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are so small that a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _setup(fusion="mid", batch=6, segments=5, **objectives):
    torch.manual_seed(0)
    model = AVBert(ModelConfig(**SMALL, fusion=fusion))
    losses = Objectives(model.config, ObjectivesConfig(**{"negatives": 8, "mask_rate": 0.3, **objectives}))
    visual = torch.randint(0, 256, (batch, segments, 3, 4, 16, 16), dtype=torch.uint8)
    audio = torch.randn(batch, segments, 1, 16, 32)
    present = torch.ones(batch, segments, dtype=torch.bool)
    return model, losses, [visual, audio, present, present.clone()]


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- negatives


def _embeddings(count=60, channels=8, seed=0):
    return torch.randn(count, channels, generator=_generator(seed))


@pytest.mark.parametrize("sampling", ["similar", "dissimilar", "random"])
def test_first_draws_follow_the_stated_probabilities(sampling):
    """Chi-square against weights computed in a plain float64 loop."""
    embeddings, anchor, draws = _embeddings(), 7, 20_000
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    others = [index for index in range(len(unit)) if index != anchor]
    distance = {index: float((unit[anchor] - unit[index]).norm()) for index in others}
    low, high = min(distance.values()), max(distance.values())
    scaled = {index: (value - low) / (high - low) for index, value in distance.items()}
    ranked = torch.tensor(sorted(scaled.values()), dtype=torch.float64)
    bounds = torch.quantile(ranked, torch.tensor([0.025, 0.975], dtype=torch.float64))
    weight = {"random": lambda d: 1.0, "similar": lambda d: 1 - d, "dissimilar": lambda d: d}[sampling]
    stated = {index: weight(value) for index, value in scaled.items()
              if sampling == "random" or bounds[0] <= value <= bounds[1]}
    drawn, valid = sample_negatives(embeddings, torch.full((draws,), anchor), 1, sampling, 95.0, _generator(1))
    assert valid.all() and set(drawn.flatten().tolist()) <= set(stated)
    counts = torch.bincount(drawn.flatten(), minlength=60)
    total = sum(stated.values())
    result = chisquare([int(counts[index]) for index in stated], [draws * value / total for value in stated.values()])
    assert result.pvalue > 1e-3
    assert len(stated) == (59 if sampling == "random" else 55)  # 95 % of 59


def test_negatives_are_distinct_never_the_positive_and_inside_the_interval():
    embeddings, anchors = _embeddings(), torch.arange(60)
    for sampling in ("similar", "dissimilar", "random"):
        drawn, valid = sample_negatives(embeddings, anchors, 20, sampling, 95.0, _generator())
        assert valid.all() and drawn.shape == (60, 20)
        assert not (drawn == anchors[:, None]).any()
        assert all(len(set(row.tolist())) == 20 for row in drawn)
    weights = sampling_weights(embeddings, anchors, "similar", 95.0)
    assert ((weights > 0).sum(1) == 55).all() and (weights[anchors, anchors] == 0).all()


def test_similar_draws_near_ones_and_dissimilar_far_ones():
    embeddings, anchors = _embeddings(200), torch.arange(200)
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    distance = torch.cdist(unit, unit)
    mean = {sampling: float(distance.gather(1, sample_negatives(
        embeddings, anchors, 10, sampling, 95.0, _generator())[0]).mean())
        for sampling in ("similar", "random", "dissimilar")}
    assert mean["similar"] < mean["random"] - 0.02 < mean["dissimilar"] - 0.04


def test_too_few_candidates_are_marked():
    drawn, valid = sample_negatives(_embeddings(3), torch.tensor([0]), 64, "random", 95.0, _generator())
    assert drawn.shape == (1, 3) and valid.sum() == 2
    assert set(drawn[valid].tolist()) == {1, 2}


def test_no_gradient_reaches_the_sampler():
    embeddings = _embeddings().requires_grad_()
    drawn, _ = sample_negatives(embeddings, torch.arange(60), 5, "similar", 95.0, _generator())
    assert not drawn.requires_grad and not sampling_weights(embeddings, torch.arange(60), "similar", 95.0).requires_grad


# --- masks and pairs


def test_masks_hide_the_stated_share_and_leave_context():
    present = torch.ones(4000, 15, dtype=torch.bool)
    present[::2, 8:] = False
    present[:100] = False
    present[100:200, 1:] = False
    hidden = masked_positions(present, 0.15, _generator())
    assert not hidden[:200].any() and not (hidden & ~present).any()  # nothing to predict one segment from
    assert (hidden[200:].sum(1) >= 1).all() and (hidden[200:].sum(1) < present[200:].sum(1)).all()
    full = hidden[201::2].float().mean()
    assert 0.15 <= full < 0.17  # a little over the rate: at least one of 15


def test_half_of_the_clips_get_anothers_sound():
    eligible = torch.tensor([True] * 9 + [False] * 3)
    changed = torch.zeros(12)
    for seed in range(300):
        [sound_of] = wrong_sounds(eligible, 1, _generator(seed))
        wrong = sound_of != torch.arange(12)
        assert wrong.sum() == 4 and not wrong[9:].any()
        assert sorted(sound_of.tolist()) == list(range(12))
        changed += wrong
    assert (changed[:9] / 300 - 4 / 9).abs().max() < 0.12
    assert torch.equal(wrong_sounds(torch.tensor([True, False]), 1, _generator())[0], torch.arange(2))
    pairs = [wrong_sounds(torch.tensor([True, True]), 1, _generator(seed))[0].tolist() for seed in range(200)]
    assert 70 < sum(pair == [1, 0] for pair in pairs) < 130 and all(sorted(pair) == [0, 1] for pair in pairs)


@pytest.mark.parametrize("clips", [2, 3])
def test_few_clips_are_exchanged_in_every_second_draw(clips):
    """Else all draws of a small batch might be wrong pairs, with no masked loss, or all right ones."""
    eligible = torch.tensor([False] + [True] * clips)
    for seed in range(50):
        wrong = [bool((sound_of != torch.arange(1 + clips)).any()) for sound_of in
                 wrong_sounds(eligible, 4, _generator(seed))]
        assert wrong in ([True, False, True, False], [False, True, False, True])


# --- losses


@pytest.mark.parametrize("fusion", ["early", "mid", "late"])
def test_loss_at_initialisation_is_chance(fusion):
    model, objectives, inputs = _setup(fusion, batch=8)
    parts = objectives(model, model.embed(*inputs), _generator()).parts
    chance = math.log(9)
    for name, times in (("mep_visual", 1), ("mep_audio", 1), ("mep_multimodal", 2)):
        if name in parts:
            assert float(parts[name]) == pytest.approx(times * chance, rel=0.06), name
    expected = {"early": {"mep_multimodal"}, "mid": {"mep_visual", "mep_audio", "mep_multimodal"},
                "late": {"mep_visual", "mep_audio"}}[fusion]
    assert {name for name in parts if name.startswith("mep")} == expected
    assert ("pair" in parts) == (fusion != "late")
    if fusion != "late":
        nn.init.zeros_(objectives.pair.projection.weight)
        nn.init.zeros_(objectives.pair.projection.bias)
        parts = objectives(model, model.embed(*inputs), _generator()).parts
        assert float(parts["pair"]) == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_chances_are_what_a_model_that_knows_nothing_gets(batch):
    """Also where a batch has fewer segments than negatives are asked for, and more right pairs than wrong ones."""
    model, objectives, inputs = _setup(batch=batch, negatives=16)
    for predictor in objectives.predictors.values():
        nn.init.zeros_(predictor.projection.weight)
    nn.init.zeros_(objectives.pair.projection.weight)
    nn.init.zeros_(objectives.pair.projection.bias)
    result = objectives(model, model.embed(*inputs), _generator())
    assert set(result.chances) == {*result.parts, "loss"}
    for name in ("mep_visual", "mep_audio", "mep_multimodal", "pair"):
        assert float(result.chances[name]) == pytest.approx(float(result.parts[name]), rel=1e-5), name
    assert float(result.chances["loss"]) == pytest.approx(float(result.loss.detach()), rel=1e-5)
    others = min(16, 5 * batch - 1)
    for name in ("top1_visual", "top1_multimodal_audio"):
        assert 1 / (1 + others) - 1e-6 <= float(result.chances[name]) <= 1 / (0.8 * others)
    always = []
    for bias in (-1.0, 1.0):
        nn.init.constant_(objectives.pair.projection.bias, bias)
        always.append(float(objectives(model, model.embed(*inputs), _generator()).parts["pair_accuracy"]))
    assert float(result.chances["pair_accuracy"]) == pytest.approx(max(always))


@pytest.mark.parametrize("draws", [1, 3])
def test_masked_loss_is_that_of_a_plain_float64_loop(draws):
    """With every other segment as a negative there is nothing random about the candidates."""
    model, objectives, inputs = _setup(sampling="random", negatives=29, pair=0.0, draws=draws)
    model, objectives = model.double().eval(), objectives.double().eval()
    for predictor in objectives.predictors.values():
        nn.init.normal_(predictor.projection.weight)  # scores far from chance
    inputs[0], inputs[1] = (inputs[0] / 255 - 0.45) / 0.225, inputs[1].double()
    inputs[0] = inputs[0].double()
    parts = objectives(model, model.embed(*inputs), _generator(3)).parts
    model.requires_grad_(False)
    objectives.requires_grad_(False)
    seen = objectives.masked_pass(model, model.embed(*inputs), _generator(3), wrong_pairs=False, draws=draws)
    for modality, name in ((0, "visual"), (1, "audio")):
        everything = seen.local[modality].flatten(0, 1)
        losses = {name: [], f"multimodal_{name}": []}
        for clip, segment in seen.predicted[modality].nonzero().tolist():
            tokens = {"visual": seen.tokens.visual_tokens, "audio": seen.tokens.audio_tokens}[name]
            joint = seen.tokens.multimodal_tokens[clip, 6 * modality + 1 + segment]
            for key, output in ((name, tokens[clip, 1 + segment]), (f"multimodal_{name}", joint)):
                head = objectives.predictors[key]
                score = [float(head.feedforward(output) @ (head.projection.weight @ x)) / math.sqrt(len(x))
                             for x in everything]
                true = score[5 * (clip % 6) + segment]
                losses[key].append(math.log(sum(math.exp(value - true) for value in score)))
        assert float(parts[f"mep_{name}"]) == pytest.approx(sum(losses[name]) / len(losses[name]), rel=1e-5)
        losses.pop(name)
        parts["mep_multimodal"] = parts["mep_multimodal"] - sum(sum(v) / len(v) for v in losses.values())
    assert abs(float(parts["mep_multimodal"])) < 1e-4


def test_a_wrong_pair_contributes_nothing_to_the_masked_loss():
    model, objectives, inputs = _setup(negatives=4)
    model.eval()
    seen = objectives.masked_pass(model, model.embed(*inputs), _generator(), wrong_pairs=True)
    assert (~seen.right).sum() == 3
    for predicted in seen.predicted:
        assert not predicted[~seen.right].any() and predicted[seen.right].any()
    tokens = [tensor.detach().requires_grad_() for tensor in seen.tokens]
    seen = seen._replace(tokens=type(seen.tokens)(*tokens), local=[values.detach() for values in seen.local])
    for predictor in objectives.predictors:
        modality = int(predictor.endswith("audio"))
        count = int(seen.predicted[modality].sum())
        candidates = torch.zeros(count, 2, dtype=torch.long)
        objectives.scores(seen, predictor, seen.local[modality].flatten(0, 1), candidates).sum().backward()
    for tensor in tokens:
        assert (tensor.grad[~seen.right] == 0).all() and (tensor.grad[seen.right] != 0).any()


@pytest.mark.parametrize("draws", [1, 3])
def test_pairs_are_judged_at_every_time_that_is_seen_and_heard(draws):
    model, objectives, inputs = _setup(draws=draws)
    model.eval()
    inputs[2][0, 3:] = inputs[3][1, :2] = inputs[3][2] = False
    embedded = model.embed(*inputs)
    parts = objectives(model, embedded, _generator()).parts
    seen = objectives.masked_pass(model, embedded, _generator(), wrong_pairs=True, draws=draws)
    logits = objectives.pair(seen.tokens.multimodal_tokens)[..., 0].tolist()
    losses, hits = [], []
    for clip, right in enumerate(seen.right.tolist()):
        times = [time for time in range(5) if bool(seen.both[clip, time])]
        assert (not times) == (clip % 6 == 2)  # silent, and silence is nobody's sound
        if times:
            chances = [1 / (1 + math.exp(-logits[clip][time])) for time in times]
            losses.append(-sum(math.log(chance if right else 1 - chance) for chance in chances) / len(times))
            hits.append(sum((chance > 0.5) == right for chance in chances) / len(times))
    assert float(parts["pair"]) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert float(parts["pair_accuracy"]) == pytest.approx(sum(hits) / len(hits), rel=1e-5)


def test_draws_mask_and_pair_the_same_clips_differently():
    model, objectives, inputs = _setup(batch=8)
    model.eval()
    embedded = model.embed(*inputs)
    seen = objectives.masked_pass(model, embedded, _generator(), wrong_pairs=True, draws=3)
    right, predicted = seen.right.view(3, 8), [mask.view(3, 8, 5) for mask in seen.predicted]
    assert (right.sum(1) == 4).all()  # half of each copy of the batch
    assert not (right[0] == right[1]).all() or not (right[1] == right[2]).all()
    shared = right.all(0)
    assert any(not (mask[0, shared] == mask[1, shared]).all() for mask in predicted)
    unchanged = objectives.masked_pass(model, embedded, _generator(), wrong_pairs=False, draws=3)
    assert unchanged.right.all() and len(unchanged.tokens.multimodal_tokens) == 24


def test_absent_segments_are_neither_predicted_nor_negatives():
    model, objectives, inputs = _setup()
    model.eval()
    inputs[2][0] = False  # a clip without pictures
    inputs[3][1] = False  # one without sound
    inputs[2][2, 2:] = inputs[3][2, 2:] = False  # a short one
    first = objectives(model, model.embed(*inputs), _generator())
    inputs[0][0] = 0
    inputs[0][2, 2:] = 255
    inputs[1][1] = 1e4
    again = objectives(model, model.embed(*inputs), _generator())
    assert torch.equal(first.loss, again.loss) and torch.isfinite(first.loss)


@pytest.mark.parametrize("case", ["sound alone", "pictures alone", "one clip", "nothing to predict"])
def test_what_is_not_there_costs_nothing(case):
    model, objectives, inputs = _setup()
    visual, audio, seen, heard = inputs
    inputs = {"sound alone": [None, audio, None, heard], "pictures alone": [visual, None, seen, None],
              "one clip": [tensor[:1] for tensor in inputs],
              "nothing to predict": [visual[:, :1], audio[:, :1], seen[:, :1], heard[:, :1]]}[case]
    model.eval()
    result = objectives(model, model.embed(*inputs), _generator())
    result.loss.backward()
    assert torch.isfinite(result.loss)
    gradients = [parameter.grad for parameter in [*model.parameters(), *objectives.parameters()]
                 if parameter.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    if case == "sound alone":
        assert {name for name in result.parts if name.startswith("mep_")} == {"mep_audio", "mep_multimodal"}
        assert model.audio_projection.weight.grad.abs().sum() > 0 and "pair" not in result.parts
    if case == "nothing to predict":
        assert not [name for name in result.parts if name.startswith("mep_")]


def test_same_generator_same_result_and_cnns_learn():
    model, objectives, inputs = _setup()
    model.eval()
    one, two, other = (objectives(model, model.embed(*inputs), _generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.loss, two.loss) and not torch.equal(one.loss, other.loss)
    one.loss.backward()
    for network in (model.visual_cnn, model.audio_cnn):
        assert all(parameter.grad is not None for parameter in network.parameters())


def test_weights_switch_parts_off():
    model, objectives, inputs = _setup(mep_visual=0.0, mep_audio=0.0, pair=0.0)
    model.eval()
    result = objectives(model, model.embed(*inputs), _generator())
    assert "pair" not in result.parts
    assert float(result.loss.detach()) == pytest.approx(float(result.parts["mep_multimodal"]))


def test_bfloat16_is_finite_and_close():
    model, objectives, inputs = _setup()
    model.eval()
    exact = objectives(model, model.embed(*inputs), _generator()).loss
    with torch.autocast("cpu", torch.bfloat16):
        rough = objectives(model, model.embed(*inputs), _generator()).loss
    assert rough.dtype == torch.float32
    assert float(rough.detach()) == pytest.approx(float(exact.detach()), rel=0.05)


def test_a_few_steps_lower_the_loss():
    model, objectives, inputs = _setup(negatives=8)
    optimizer = torch.optim.Adam([*model.parameters(), *objectives.parameters()], lr=3e-3)
    losses = []
    for step in range(40):
        loss = objectives(model, model.embed(*inputs), _generator(step % 2)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
