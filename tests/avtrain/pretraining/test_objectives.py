"""The losses against plain loops, chance, and what must not matter."""

import math

import pytest
import torch
from torch import nn

from avtrain.config import ModelConfig, ObjectivesConfig
from avtrain.models.avbert import AVBert
from avtrain.pretraining.draw import Clips, drawn
from avtrain.pretraining.objectives import Objectives, shared_group

SMALL = {"visual_width": 4, "visual_blocks": (1,), "audio_width": 4, "audio_blocks": (1,), "audio_stem_stride": 4,
         "dimension": 16, "layers": 1, "heads": 2, "feedforward": 32, "rank": 4, "dropout": 0.0, "max_segments": 6}


def _setup(fusion="mid", batch=6, segments=5, **objectives):
    torch.manual_seed(0)
    model = AVBert(ModelConfig(**SMALL, fusion=fusion))
    losses = Objectives(model.config, ObjectivesConfig(**{"negatives": 8, "mask_rate": 0.3, **objectives}))
    visual = torch.randint(0, 256, (batch, segments, 3, 4, 16, 16), dtype=torch.uint8)
    audio = torch.randn(batch, segments, 1, 16, 32)
    present = torch.ones(batch, segments, dtype=torch.bool)
    return model, losses, [visual, audio, present, present.clone()]


def _drawn(objectives, visual_present, audio_present, step=0, pairs=True):
    clips, config = len(visual_present), objectives.config
    sources = [f"video{clip}" for clip in range(clips)]
    return drawn(Clips(visual_present, audio_present, sources), range(clips), 0, step, config.mask_rate, config.draws,
                 pairs)


def _result(model, objectives, inputs, step=0):
    embedded, *present = model.embed(*inputs)
    draw = _drawn(objectives, *present, step, pairs=objectives.config.pair > 0)
    return objectives(model, embedded, draw, _all_read(embedded))


def _all_read(embedded):
    return torch.ones(len(embedded.visual_local), dtype=torch.bool)


def _tokens(objectives, model, embedded, draw):
    return objectives.tokens(model, embedded, shared_group(embedded, _all_read(embedded), draw), draw)


@pytest.mark.parametrize("fusion", ["early", "mid", "late"])
def test_loss_at_initialisation_is_chance(fusion):
    model, objectives, inputs = _setup(fusion, batch=8)
    parts = _result(model, objectives, inputs).parts
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
        parts = _result(model, objectives, inputs).parts
        assert float(parts["pair"]) == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_chances_are_what_a_model_that_knows_nothing_gets(batch):
    """Also where a batch has fewer segments than negatives are asked for, and more right pairs than wrong ones."""
    model, objectives, inputs = _setup(batch=batch, negatives=16)
    for predictor in objectives.predictors.values():
        nn.init.zeros_(predictor.projection.weight)
    nn.init.zeros_(objectives.pair.projection.weight)
    nn.init.zeros_(objectives.pair.projection.bias)
    result = _result(model, objectives, inputs)
    assert set(result.chances) == {*result.parts, "loss"}
    for name in ("mep_visual", "mep_audio", "mep_multimodal", "pair"):
        assert float(result.chances[name]) == pytest.approx(float(result.parts[name]), rel=1e-5), name
    assert float(result.chances["loss"]) == pytest.approx(float(result.loss.detach()), rel=1e-5)
    others = min(16, 5 * batch - 1)
    for name in ("top1_visual", "top1_multimodal_audio"):
        assert 1 / (1 + others) - 1e-6 <= float(result.chances[name]) <= 1 / (0.8 * others)
        assert float(result.parts[name]) == 0  # all scores are the same: a tie is no hit
    always = []
    for bias in (-1.0, 1.0):
        nn.init.constant_(objectives.pair.projection.bias, bias)
        always.append(float(_result(model, objectives, inputs).parts["pair_accuracy"]))
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
    parts = _result(model, objectives, inputs).parts
    model.requires_grad_(False)
    objectives.requires_grad_(False)
    embedded, *present = model.embed(*inputs)
    draw = _drawn(objectives, *present, pairs=False)
    seen = _tokens(objectives, model, embedded, draw)
    for modality, name in ((0, "visual"), (1, "audio")):
        everything = embedded.local(modality).flatten(0, 1)
        losses = {name: [], f"multimodal_{name}": []}
        for row, segment in draw.masks[modality].nonzero().tolist():
            tokens = {"visual": seen.visual_tokens, "audio": seen.audio_tokens}[name]
            joint = seen.multimodal_tokens[row, 6 * modality + 1 + segment]
            for key, output in ((name, tokens[row, 1 + segment]), (f"multimodal_{name}", joint)):
                head = objectives.predictors[key]
                score = [float(head.feedforward(output) @ (head.projection.weight @ x)) / math.sqrt(len(x))
                             for x in everything]
                true = score[5 * (row % 6) + segment]
                losses[key].append(math.log(sum(math.exp(value - true) for value in score)))
        assert float(parts[f"mep_{name}"]) == pytest.approx(sum(losses[name]) / len(losses[name]), rel=1e-12)
        losses.pop(name)
        parts["mep_multimodal"] = parts["mep_multimodal"] - sum(sum(v) / len(v) for v in losses.values())
    assert abs(float(parts["mep_multimodal"])) < 1e-10


def test_a_wrong_pair_counts_where_its_sound_or_picture_is_alone():
    """Each single-modality Transformer sees one clip; the multimodal one has no right answer there."""
    model, objectives, inputs = _setup(negatives=4, batch=8)
    model.eval()
    embedded, *present = model.embed(*inputs)
    draw = _drawn(objectives, *present)
    right = draw.pairs.right
    assert 0 < right.sum() < 8
    tokens = type(_tokens(objectives, model, embedded, draw))(*(
        tensor.detach().requires_grad_() for tensor in _tokens(objectives, model, embedded, draw)))
    for predictor in objectives.predictors:
        predicted, local = draw.predicted["audio" in predictor], embedded.local("audio" in predictor).flatten(0, 1)
        outputs = predicted.outputs[predicted.joint] if "multi" in predictor else predicted.outputs
        objectives.scores(tokens, predictor, outputs, local.detach(),
                          torch.zeros(len(outputs), 2, dtype=torch.long)).sum().backward()
    of_row = [tensor.grad.abs().sum((1, 2)) for tensor in tokens]
    assert (of_row[0] > 0).all() and (of_row[1] > 0).all()
    assert torch.equal(of_row[2] > 0, right)


@pytest.mark.parametrize("modality", [0, 1])
def test_what_is_predicted_is_what_was_hidden_in_that_row(modality):
    """The target of an output is the segment that its row was shown a mask for, whosever sound the row has."""
    _, objectives, _ = _setup(batch=8)
    present = torch.ones(8, 5, dtype=torch.bool)
    present[3, 4] = False
    draw = _drawn(objectives, present, present.clone(), step=1)
    assert not draw.pairs.right.all()
    rows_own = torch.arange(8) if modality == 0 else draw.pairs.sound_of
    predicted = draw.predicted[modality]
    assert torch.equal(predicted.outputs, draw.masks[modality].flatten().nonzero()[:, 0])
    own = rows_own[predicted.outputs // 5] * 5 + predicted.outputs % 5
    assert torch.equal(draw.here[modality][predicted.targets], own)


@pytest.mark.parametrize("fusion", ["early", "mid", "late"])
def test_what_is_hidden_is_seen_nowhere_and_each_row_hears_its_own_sound(fusion):
    """What stands in the hidden segments changes nothing; what a row has in the others is what it was given."""
    model, objectives, inputs = _setup(fusion, batch=8)
    model.eval()
    embedded, *present = model.embed(*inputs)
    draw = _drawn(objectives, *present, pairs=fusion != "late")
    sound_of = draw.pairs.sound_of
    assert (sound_of != torch.arange(8)).any() == (fusion != "late")
    shown = _tokens(objectives, model, embedded, draw)
    hidden = [mask[..., None] for mask in draw.masks]
    of_clips = hidden[1][sound_of.argsort()]  # hidden[1] is of the sounds that rows get
    other = embedded._replace(visual_local=embedded.visual_local.masked_fill(hidden[0], 9.0),
                              audio_local=embedded.audio_local.masked_fill(of_clips, 9.0))
    for one, again in zip(shown, _tokens(objectives, model, other, draw), strict=True):
        assert one is again is None or torch.equal(one, again)
    everything = torch.ones(1, 5, dtype=torch.bool)
    for row, sound in enumerate(sound_of.tolist()):  # each row by itself
        visual = torch.where(hidden[0][row], objectives.mask[0], embedded.visual_local[row])[None]
        audio = torch.where(hidden[1][row], objectives.mask[1], embedded.audio_local[sound])[None]
        for one, alone in zip(shown, model.contextualize(visual, audio, everything, everything), strict=True):
            assert one is alone is None or torch.allclose(one[row], alone[0], atol=1e-5)


def test_targets_learn_too():
    """Through W_I the loss reaches the true segment's own embedding, though its output was made from a mask."""
    model, objectives, inputs = _setup(batch=4, pair=0.0)
    model.eval()
    embedded, *present = model.embed(*inputs)
    embedded = type(embedded)(*(tensor.detach().requires_grad_() for tensor in embedded))
    draw = _drawn(objectives, *present, pairs=False)
    objectives(model, embedded, draw, _all_read(embedded)).loss.backward()
    for modality in (0, 1):
        assert (embedded.local(modality).grad[draw.masks[modality]].abs().sum(1) > 0).all()


@pytest.mark.parametrize("draws", [1, 3])
def test_pairs_are_judged_at_every_time_that_is_seen_and_heard(draws):
    model, objectives, inputs = _setup(draws=draws, batch=6)
    model.eval()
    inputs[2][0, 3:] = inputs[3][1, :1] = inputs[3][2] = False  # three times, four, none
    inputs[2][4, 3:] = inputs[3][5, :1] = False
    embedded, *present = model.embed(*inputs)
    draw = _drawn(objectives, *present)
    parts = objectives(model, embedded, draw, _all_read(embedded)).parts
    logits = objectives.pair(_tokens(objectives, model, embedded, draw).multimodal_tokens)[..., 0].tolist()
    losses, hits, alone = [], [], 0
    for row, (sound, right) in enumerate(zip(draw.pairs.sound_of.tolist(), draw.pairs.right.tolist(), strict=True)):
        times = [time for time in range(5) if inputs[2][row % 6, time] and inputs[3][sound % 6, time]]
        counted = [time for time in range(5) if draw.pairs.divisors[row, time] > 0]
        assert counted == (times if row % 6 not in (2, 3) else [])  # silent; the only one of its length
        alone += not counted
        if counted:
            chances = [1 / (1 + math.exp(-logits[row][time])) for time in times]
            losses.append(-sum(math.log(chance if right else 1 - chance) for chance in chances) / len(times))
            hits.append(sum((chance > 0.5) == right for chance in chances) / len(times))
    assert alone == 2 * draws
    assert float(parts["pair"]) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert float(parts["pair_accuracy"]) == pytest.approx(sum(hits) / len(hits), rel=1e-5)


def test_absent_segments_are_neither_predicted_nor_negatives():
    model, objectives, inputs = _setup()
    model.eval()
    inputs[2][0] = False  # a clip without pictures
    inputs[3][1] = False  # one without sound
    inputs[2][2, 2:] = inputs[3][2, 2:] = False  # a short one
    first = _result(model, objectives, inputs)
    inputs[0][0] = 0
    inputs[0][2, 2:] = 255
    inputs[1][1] = 1e4
    again = _result(model, objectives, inputs)
    assert torch.equal(first.loss, again.loss) and torch.isfinite(first.loss)


@pytest.mark.parametrize("fusion", ["mid", "late"])
def test_a_clip_that_could_not_be_read_counts_for_nothing(fusion):
    """Neither what stands in its place, nor what is predicted of it; the others' share stays what it was."""
    model, objectives, inputs = _setup(fusion, sampling="random", negatives=29)
    model.eval()
    embedded, *present = model.embed(*inputs)
    draw, read = _drawn(objectives, *present, pairs=fusion != "late"), torch.arange(6) != 2
    found = []
    for fill in (None, 0.0, 7.0):
        here = embedded if fill is None else type(embedded)(*(
            tensor.masked_fill(~read[:, None, None], fill) for tensor in embedded))
        found.append(objectives(model, here, draw, read))
    assert torch.equal(found[1].loss, found[0].loss) and torch.equal(found[2].loss, found[0].loss)
    for one, again in zip(found[0].figures().items(), found[2].figures().items(), strict=True):
        assert one == again
    count = int(read[draw.predicted[0].clips].sum())
    assert float(found[0].chances["mep_visual"]) == pytest.approx(
        count / draw.counts.predicted[0] * math.log(25), rel=1e-5)  # of 30 candidates 5 are not there


@pytest.mark.parametrize("case", ["sound alone", "pictures alone", "one clip", "nothing to predict"])
def test_what_is_not_there_costs_nothing(case):
    model, objectives, inputs = _setup()
    visual, audio, seen, heard = inputs
    inputs = {"sound alone": [None, audio, None, heard], "pictures alone": [visual, None, seen, None],
              "one clip": [tensor[:1] for tensor in inputs],
              "nothing to predict": [visual[:, :1], audio[:, :1], seen[:, :1], heard[:, :1]]}[case]
    model.eval()
    result = _result(model, objectives, inputs)
    result.loss.backward()
    assert torch.isfinite(result.loss)
    for name, parameter in [*model.named_parameters(), *objectives.named_parameters()]:
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name  # of zero at the least
    if case == "sound alone":
        assert {name for name in result.parts if name.startswith("mep_")} == {"mep_audio", "mep_multimodal"}
        assert model.audio_projection.weight.grad.abs().sum() > 0 and "pair" not in result.parts
    if case == "nothing to predict":
        assert not [name for name in result.parts if name.startswith("mep_")]


def test_same_step_same_result_and_cnns_learn():
    model, objectives, inputs = _setup()
    model.eval()
    one, two, other = (_result(model, objectives, inputs, step) for step in (0, 0, 1))
    assert torch.equal(one.loss, two.loss) and not torch.equal(one.loss, other.loss)
    one.loss.backward()
    for network in (model.visual_cnn, model.audio_cnn):
        assert all(parameter.grad is not None for parameter in network.parameters())


def test_weights_switch_parts_off():
    model, objectives, inputs = _setup(mep_visual=0.0, mep_audio=0.0, pair=0.0)
    model.eval()
    result = _result(model, objectives, inputs)
    assert "pair" not in result.parts
    assert float(result.loss.detach()) == pytest.approx(float(result.parts["mep_multimodal"]))


def test_bfloat16_is_finite_and_close():
    """Where predictions say something: after some steps, for what is known by heart; untrained, noise would do."""
    model, objectives, inputs = _setup(sampling="random")
    modules = nn.ModuleList([model, objectives])
    optimizer = torch.optim.Adam(modules.parameters(), lr=3e-3)

    def result(bfloat16):
        modules.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            found = _result(model, objectives, inputs)
        found.loss.backward()
        return found, torch.cat([parameter.grad.flatten() for parameter in modules.parameters()
                                 if parameter.grad is not None])

    for _ in range(40):
        result(False)
        optimizer.step()
    (exact, exact_gradient), (rough, rough_gradient) = result(False), result(True)
    assert rough.loss.dtype == torch.float32 and exact.parts.keys() == rough.parts.keys()
    for part in ("mep_visual", "mep_audio", "mep_multimodal", "pair"):
        learned = float(exact.chances[part] - exact.parts[part])
        assert learned > 0.3 * float(exact.chances[part]), part
        assert float(rough.parts[part]) == pytest.approx(float(exact.parts[part]), abs=0.1 * learned), part
    assert torch.cosine_similarity(rough_gradient, exact_gradient, dim=0) > 0.7


def test_a_few_steps_lower_the_loss():
    model, objectives, inputs = _setup(negatives=8)
    optimizer = torch.optim.Adam([*model.parameters(), *objectives.parameters()], lr=3e-3)
    losses = []
    for step in range(40):
        loss = _result(model, objectives, inputs, step % 2).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
