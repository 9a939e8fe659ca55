"""Evaluation on held-out clips: which they are, what candidates are drawn, what is counted, and what it takes."""

import itertools
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare

from avtrain.config import read_config
from avtrain.data.clips import ClipDataset
from avtrain.data.loader import batches
from avtrain.data.order import ClipPlace, Wanted, batches_of
from avtrain.data.shards import open_folders
from avtrain.pretraining.draw import drawn, planned
from avtrain.pretraining.held_out import _SEED, HeldOut, chosen, hits_among, random_others
from avtrain.pretraining.module import Pretraining, inputs_of
from avtrain.pretraining.objectives import present_rows, shared_group
from avtrain.runtime import Runtime

CONFIG = read_config("tiny", [
    "training.batch_size=4", "data.segment_frames=4", "data.crop=24", "data.scale=[24, 32]", "data.workers=0",
    "model.visual_width=8", "model.audio_width=8", "model.dimension=32", "model.feedforward=64", "model.layers=1",
    "model.rank=8", "objectives.negatives=16"])
CPU = Runtime(torch.device("cpu"), None)


# --- which clips


@pytest.mark.parametrize(("clips", "most"), [([155] * 220, 2048), ([400, 3, 0, 1, 250], 100), ([5, 5], 1)])
def test_as_many_as_asked_for_evenly_over_the_shards(clips, most):
    places = chosen(clips, most, 8)
    assert len(set(places)) == len(places) == most and places == chosen(clips, most, 8)
    found = Counter(place.shard for place in places)
    assert all(0 <= place.position < clips[place.shard] for place in places)
    assert all(abs(found[shard] - count * most / sum(clips)) < 1 for shard, count in enumerate(clips))
    if most > 100:  # not the first ones of each
        assert max(place.position for place in places) > 145


def test_all_where_there_are_no_more():
    clips = [7, 0, 12, 1]
    places = chosen(clips, 2048, 8)
    assert sorted(places) == [(shard, position) for shard, count in enumerate(clips) for position in range(count)]
    assert places != sorted(places)


@pytest.mark.parametrize("most", [2048, 100_000])
def test_reading_moves_through_the_shards(most):
    """Each is opened in one stretch, beside a few others: none again and again."""
    places = chosen([155] * 220, most, 8)
    of_shard = {}
    for number, place in enumerate(places):
        of_shard.setdefault(place.shard, []).append(number)
    at_once = [sum(numbers[0] <= number <= numbers[-1] for numbers in of_shard.values())
               for number in range(0, len(places), 50)]
    assert len(of_shard) == 220 and max(at_once) <= 8
    mixed = sum(one.shard != other.shard for one, other in itertools.pairwise(places)) / len(places)
    assert mixed > 0.8  # clips of one shard aren't seen together


# --- candidates


def test_others_are_uniform_without_itself_or_repeats():
    size = 12_000
    drawn = random_others(torch.arange(size), size, 4)
    assert (drawn.sort(1).values.diff(dim=1) > 0).all() and not (drawn == torch.arange(size)[:, None]).any()
    assert chisquare(torch.bincount(drawn.flatten() // 1000, minlength=12).numpy()).pvalue > 1e-3
    offsets = (drawn - torch.arange(size)[:, None]) % size  # relative to itself: neighbours are as likely as others
    assert chisquare(torch.bincount((offsets.flatten() - 1) * 11 // (size - 1), minlength=11).numpy()).pvalue > 1e-3


def test_all_sets_are_alike_likely(monkeypatch):
    sets: Counter = Counter()
    for seed in range(4000):
        monkeypatch.setattr("avtrain.pretraining.held_out._SEED", seed)
        sets.update(tuple(sorted(row)) for row in random_others(torch.tensor([2]), 7, 3).tolist())
    assert set(sets) == set(itertools.combinations([0, 1, 3, 4, 5, 6], 3))
    assert chisquare(list(sets.values())).pvalue > 1e-3


@pytest.mark.parametrize("size", [1, 2, 99, 100, 101, 130])
def test_all_others_where_there_are_no_more(size):
    drawn = random_others(torch.arange(size), size, 99)
    assert drawn.shape == (size, min(99, size - 1))
    for itself, row in enumerate(drawn.tolist()):
        assert len(set(row) - {itself}) == len(row) and set(row) <= set(range(size))


def test_the_same_every_time_and_whatever_else_is_asked():
    true = torch.tensor([5, 70_000, 123])
    drawn = random_others(true, 510_000, 99)
    assert torch.equal(drawn, random_others(true, 510_000, 99))
    assert torch.equal(drawn[1:2], random_others(true[1:2], 510_000, 99))
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.seconds
def test_memory_at_the_papers_size_is_that_of_what_is_drawn():
    """34,000 clips of 15 segments, 0.15 of them hidden: all of them for all would be 39 GB in booleans alone."""
    code = ("import resource, torch; from avtrain.pretraining.held_out import random_others; "
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024; before = peak(); "
            "drawn = random_others(torch.arange(0, 510_000, 20) * 3 % 510_000, 510_000, 99); "
            "print(peak() - before, drawn.numel() * 8 / 2**20)")
    mib, drawn_mib = map(float, subprocess.run([sys.executable, "-c", code], check=True, capture_output=True,
                                               text=True).stdout.split())
    assert mib < 4 * drawn_mib + 20, (mib, drawn_mib)


# --- figures


@pytest.fixture(scope="module")
def folder(demo_shards):
    return open_folders([str(demo_shards / "train"), str(demo_shards / "test")])


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    made = Pretraining(CONFIG).eval()
    for predictor in made.objectives.predictors.values():  # scores far from one another
        torch.nn.init.normal_(predictor.projection.weight)
    return made


def test_masked_top1_is_that_of_all_scores_at_once(folder, network):
    """Against every position's score with every held-out segment, as training has it within a part."""
    found = HeldOut(folder, CONFIG, CPU).figures(network)
    model, objectives = network.model, network.objectives
    places = batches_of(chosen(folder.clips_of_shards, 2048, CONFIG.data.shards_at_once), 4)
    passes = []
    with torch.no_grad():
        dataset, parts = ClipDataset(folder, CONFIG.data, None), [[Wanted(one, 0) for one in part] for part in places]
        for number, batch in enumerate(batches(dataset, parts, 0)):
            draw = drawn(planned(dataset, parts[number]), range(4 * number, 4 * number + len(parts[number])), _SEED, 1,
                         CONFIG.objectives.mask_rate, 1, False)
            *inputs, read = inputs_of(batch, len(parts[number]), CPU.device)
            embedded = model.embed_segments(*inputs)
            group = shared_group(embedded, read, draw)
            passes.append((embedded, objectives.tokens(model, embedded, group, draw), draw))
        for predictor in objectives.predictors:
            modality = int(predictor.endswith("audio"))
            pool = torch.cat([present_rows(embedded.local(modality), draw, modality) for embedded, _, draw in passes])
            before, hits = 0, []
            for embedded, tokens, draw in passes:
                predicted = draw.predicted[modality]
                true = predicted.targets + before
                before += len(present_rows(embedded.local(modality), draw, modality))
                candidates = torch.cat((true[:, None], random_others(true, len(pool), 99)), 1)
                scores = objectives.scores(tokens, predictor, predicted.outputs, pool, candidates)
                hits += (scores.argmax(1) == 0).tolist()
            assert len(hits) > 30 and found[f"test_masked_top1_{predictor}"] == pytest.approx(sum(hits) / len(hits))
            assert found[f"test_chance_masked_top1_{predictor}"] == pytest.approx(0.01)
    assert 0 < sum(found[f"test_masked_top1_{predictor}"] for predictor in objectives.predictors)


def test_hits_are_the_same_however_many_are_looked_at_once(network, monkeypatch):
    predictor, pool = network.objectives.predictors["audio"], torch.randn(300, 32)
    outputs = predictor(torch.randn(50, 32), pool)[1][:50].detach()
    candidates = torch.cat((torch.arange(50)[:, None], random_others(torch.arange(50), 300, 99)), 1)
    with torch.no_grad():
        whole = hits_among(predictor, outputs, pool, candidates)
        monkeypatch.setattr("avtrain.pretraining.held_out._AT_ONCE", 3200 * 7)
        assert hits_among(predictor, outputs, pool, candidates) == whole


def test_no_more_clips_than_the_setting_in_parts_no_larger_than_trainings(folder, network, monkeypatch):
    sizes, embed = [], network.model.embed_segments

    def embedding(visual, audio, visual_present, *rest):
        sizes.append(len(visual_present))
        return embed(visual, audio, visual_present, *rest)

    monkeypatch.setattr(network.model, "embed_segments", embedding)
    config = replace(CONFIG, training=replace(CONFIG.training, held_out_clips=7, batch_size=8, micro_batch=2))
    held_out = HeldOut(folder, config, CPU)
    first = held_out.figures(network)
    assert sizes == [2, 2, 2, 1] and folder.clips == 12
    assert held_out.figures(network) == first  # the same clips, masks, pairs and candidates
    assert {"test_loss", "test_pair_accuracy", "test_masked_top1_visual"} <= set(first)


def test_the_network_stays_in_its_mode_and_measures_nothing(folder, network):
    network.train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    HeldOut(folder, CONFIG, CPU).figures(network)
    assert network.training and len(before) > 10
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, before[name]), name
    network.eval()


def test_a_clip_that_can_not_be_read_is_as_one_without_anything(folder, network, monkeypatch):
    """Nothing of it is predicted, chosen among or paired."""
    key = folder.rows.at(ClipPlace(1, 0)).key
    fill, there = ClipDataset._fill, ClipDataset._there

    def filled(self, row, *rest):
        if row.key == key:
            raise ValueError("no picture")
        fill(self, row, *rest)

    def nothing(self, row):
        return there(self, row) & (row.key != key)

    monkeypatch.setattr("avtrain.data.loader.MOST_UNREADABLE", 0.5)
    whole, found = HeldOut(folder, CONFIG, CPU).figures(network), []
    for name, instead in (("_fill", filled), ("_there", nothing)):
        with monkeypatch.context() as patch:
            patch.setattr(ClipDataset, name, instead)
            found.append(HeldOut(folder, CONFIG, CPU).figures(network))
    names = [name for name in whole if "masked_top1" in name]
    assert len(names) == 8 and {name: found[0][name] for name in names} == {name: found[1][name] for name in names}
    assert found[0].keys() == whole.keys() and found[0]["test_loss"] != whole["test_loss"]
    assert found[0]["test_loss"] == pytest.approx(whole["test_loss"], rel=0.1)
