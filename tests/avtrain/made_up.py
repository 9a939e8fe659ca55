"""`pretrain` on made-up clips, and the best that can be done there by chance.

Clips are coarse noise: segments differ much, so that whatever gives one away is soon found. They take the place of
shards; all the rest is what a run uses.
"""

import json
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch

from avtrain.config import read_config
from avtrain.data.loader import Batch
from avtrain.data.manifest import video_of
from avtrain.pretraining.module import Pretraining
from avtrain.pretraining.objectives import present_rows
from avtrain.pretraining.pretrain import pretrain
from avtrain.runtime import choose_runtime

SMALL = [
    "model.visual_width=8", "model.audio_width=8", "model.dimension=64", "model.heads=4", "model.feedforward=128",
    "model.rank=16", "data.segments=8", "data.segment_frames=2", "data.crop=8", "data.scale=[8, 8]", "data.mels=16",
    "data.mel_frames=16", "data.workers=0", "objectives.negatives=32", "objectives.mask_rate=0.25",
    "objectives.draws=4", "training.batch_size=16", "training.micro_batch=16", "training.learning_rate=2e-3",
    "training.warmup=0.12", "training.log_every=1"]
HELD_OUT_SHARDS = [64, 64, 64]


# --- clips


@dataclass
class Clips:
    """Made-up clips.

    Attributes:
        visual: (clips, segments, 3, frames, height, width) uint8.
        audio: (clips, segments, 1, mels, frames).
        seen, heard: (clips, segments) boolean, which are there.
        keys: of each clip.
        contents: (clips, segments), alike where what is in them is alike.
    """

    visual: torch.Tensor
    audio: torch.Tensor
    seen: torch.Tensor
    heard: torch.Tensor
    keys: list
    contents: torch.Tensor


def noise(config, count, random):
    """Every segment by itself: nothing in a clip tells anything of the rest of it."""
    data, segments = config.data, config.data.segments
    visual = torch.randint(0, 256, (count, segments, 3, 1, 2, 2), generator=random, dtype=torch.uint8)
    visual = visual.expand(-1, -1, -1, data.segment_frames, -1, -1)
    for dimension in (4, 5):
        visual = visual.repeat_interleave(data.crop // 2, dimension)
    audio = 3 * torch.randn(count, segments, 1, 4, 1, generator=random) - 3
    audio = audio.repeat_interleave(data.mels // 4, 3).expand(-1, -1, -1, -1, data.mel_frames)
    audio = audio + 0.3 * torch.randn(audio.shape, generator=random)
    wanted = {"both": (True, True), "visual": (True, False), "audio": (False, True)}[data.modality]
    seen, heard = (torch.full((count, segments), there) for there in wanted)
    return Clips(visual.contiguous(), audio.contiguous(), seen, heard, [f"video{clip}-0000" for clip in range(count)],
                 torch.arange(count * segments).view(count, segments))


def of_all_lengths(config, count, random):
    """From one segment to all of them."""
    clips = noise(config, count, random)
    lengths = torch.randint(1, config.data.segments + 1, (count, 1), generator=random)
    there = torch.arange(config.data.segments) < lengths
    clips.seen &= there
    clips.heard &= there
    return clips


def lacking(config, count, random):
    """Of all lengths; a quarter has no sound, a quarter no picture, and some have less of one than of the other."""
    clips, kinds = of_all_lengths(config, count, random), torch.randint(0, 8, (count,), generator=random)
    clips.heard[kinds < 2] = False
    clips.seen[(kinds == 2) | (kinds == 3)] = False
    clips.heard[kinds == 4, 1:] = False
    return clips


def of_few_sources(config, count, random, make=noise):
    """Several clips of each source, and of some sources most."""
    clips = make(config, count, random)
    sources = (torch.rand(count, generator=random) ** 2 * (count / 3 + 1)).long().tolist()
    clips.keys[:] = [f"video{source}-{clip:04}" for clip, source in enumerate(sources)]
    return clips


def twice(config, count, random):
    """Every clip twice: as one of the same source, or under another name."""
    clips, half = noise(config, count, random), count // 2
    for values in (clips.visual, clips.audio, clips.contents):
        values[half:2 * half] = values[:half]
    clips.keys[half:half + half // 2] = [f"video{clip}-0001" for clip in range(half // 2)]
    return clips


def everything(config, count, random):
    """All of it at once."""
    return of_few_sources(config, count, random, lacking)


def still(config, count, random):
    """The next segment repeats the last: what was hidden can be seen in the others."""
    clips = noise(config, count, random)
    for values in (clips.visual, clips.audio):
        values[:] = values[:, :1].clone()
    return clips


def named_by_sound(config, count, random):
    """Pictures of a clip are dark where it sounds low, and bright where it sounds high."""
    clips = noise(config, count, random)
    bright = torch.randint(0, 2, (count, 1, 1, 1, 1), generator=random)
    clips.visual[:] = clips.visual // 4 + (192 * bright[..., None]).to(torch.uint8)
    clips.audio[:] = clips.audio / 4 + 6 * bright
    return clips


# --- runs


class _Folder(SimpleNamespace):
    """What a run asks of a folder of shards: how many clips there are, and their sources."""

    def __init__(self, clips_of_shards, keys):
        shards = [SimpleNamespace(url="made up", size=0) for _ in clips_of_shards]
        super().__init__(clips_of_shards=clips_of_shards, shards=shards, clips=sum(clips_of_shards),
                         fingerprint="made up", rows=self)
        self._keys = keys

    def number(self, place):
        """Of a clip, among all."""
        return sum(self.clips_of_shards[:place.shard]) + place.position

    def at(self, place):
        """The clip's row."""
        return SimpleNamespace(video=video_of(self._keys[self.number(place)]))


class _Dataset:
    """In the place of `ClipDataset`: every epoch has other clips, made by `make`; held-out ones are always the same."""

    contents = None  # of the part of a batch that was read last

    def __init__(self, make, config, folder, seed):
        self._make, self._config, self.folder = make, config, folder
        self._seed, self._epoch, self._clips = 10**6 if seed is None else seed, None, None

    def presence(self, wanted):
        """(2, segments) boolean."""
        clips, number = self._of(wanted.epoch), self.folder.number(wanted.place)
        return torch.stack((clips.seen[number], clips.heard[number])).numpy()

    def batch_bytes(self, at):
        """Next to nothing."""
        return 1

    def ahead(self, items):
        """Nothing is fetched."""
        return items

    def __getitems__(self, at):
        clips, numbers = self._of(at[0].epoch), [self.folder.number(one.place) for one in at]
        seen, heard, _Dataset.contents = clips.seen[numbers], clips.heard[numbers], clips.contents[numbers]
        return Batch(clips.visual[numbers][seen], clips.audio[numbers][heard], seen, heard, [[]] * len(at),
                     [clips.keys[number] for number in numbers], list(range(len(at))), [], len(at))

    def _of(self, epoch):
        if self._epoch != epoch:
            random = torch.Generator().manual_seed(self._seed * 10**4 + epoch)
            self._epoch, self._clips = epoch, self._make(self._config, self.folder.clips, random)
        return self._clips


@dataclass
class Found:
    """What a run came to.

    Attributes:
        excess: figure -> (steps,) of the last quarter of training, what it was over the best that chance allows.
        held_out: figure -> of held-out clips, and the best that chance allows there with three standard errors.
    """

    excess: dict
    held_out: dict

    def exceeding(self):
        """The figures that were better than chance, by more than three standard errors: name -> by how much."""
        found = {}
        for name, values in self.excess.items():
            error = float(values.std()) / len(values) ** 0.5
            if float(values.mean()) > 3 * error:
                found[name] = f"{float(values.mean()):.4f} over chance (standard error {error:.4f})"
        for name, (value, most) in self.held_out.items():
            if value > most:
                found[f"held-out {name}"] = f"{value:.4f}, chance with three standard errors {most:.4f}"
        return found


def pretrained(folder, make, steps=200, seed=0, preset="tiny", settings=(), precision="float32"):
    """Pretrain on clips that `make` makes, anew at every step: an epoch is a batch."""
    config = read_config(preset, [*SMALL, *settings, f"training.steps={steps}", f"training.seed={seed}",
                                  f"training.save_every={steps}", f"training.evaluate_every={steps}"])

    def folder_of(names, labelled):
        shards = HELD_OUT_SHARDS if names == ["test"] else [config.training.batch_size]
        return _Folder(shards, make(config, sum(shards), torch.Generator().manual_seed(seed)).keys)

    def dataset_of(folder, _, seed):
        return _Dataset(make, config, folder, seed)

    guesses = _Guesses(steps - steps // 4)
    with ExitStack() as patches:
        for name, instead in (("pretrain.open_folders", folder_of), ("pretrain.ClipDataset", dataset_of),
                              ("held_out.ClipDataset", dataset_of), ("pretrain.Pretraining", guesses.watching),
                              ("report.picture_of", lambda lines: b"")):
            patches.enter_context(mock.patch(f"avtrain.pretraining.{name}", instead))
        pretrain(config, ["train"], ["test"], folder, choose_runtime("cpu", precision))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    excess = {name: torch.tensor([sum(values) / len(values) for values in of_steps.values()])
              for name, of_steps in guesses.excess.items()}
    pairs = [line["pair_accuracy"] - 0.5 for line in lines[-(steps // 4):] if "pair_accuracy" in line]
    if pairs:
        excess["pair_accuracy"] = torch.tensor(pairs)
    return Found(excess, _held_out(lines[-1], config, guesses.held_out_pairs))


class _Guesses:
    """Whether training's own outputs pick the hidden segment among all of the part's, and how often chance would: in
    one of so many that are not seen in the clip itself.

    Not among the candidates of the loss: content-aware sampling is no fair draw. It takes what is near (or far), and
    where a segment lies among its candidates then tells a little, to a network that has learned nothing: 5 points more
    than chance with sampling = "dissimilar", 4 fewer with "similar" (8 negatives, clips of noise, 600 steps).

    Args:
        first_step: that is looked at.
    """

    def __init__(self, first_step):
        self.excess = defaultdict(lambda: defaultdict(list))  # figure -> step -> of each position
        self.held_out_pairs = []  # judged, of each part that has any
        self._first_step, self._computed = first_step, 0

    def watching(self, config):
        """The network of a run, whose outputs are looked at in training."""
        network = Pretraining(config)
        compute, training = network.objectives.tokens, config.training
        parts = training.batch_size // (training.micro_batch or training.batch_size)

        def tokens_of(model, embedded, group, draw):
            tokens = compute(model, embedded, group, draw)
            if network.training:
                step = self._computed // parts
                self._computed += 1
                if step >= self._first_step:
                    self._look(network.objectives, step, tokens, group, draw)
            elif draw.counts.pairs:
                self.held_out_pairs.append(draw.counts.pairs)
            return tokens

        network.objectives.tokens = tokens_of
        return network

    @torch.no_grad()
    def _look(self, objectives, step, tokens, group, draw):
        contents = _Dataset.contents
        for modality, name in enumerate(("visual", "audio")):
            predicted, named = draw.predicted[modality], contents.flatten()[draw.here[modality]]
            if not len(predicted.outputs):
                continue
            row = predicted.outputs // contents.shape[1]
            shown = draw.present[modality][row] & ~draw.masks[modality][row]  # (n, segments)
            seen = contents[predicted.clips].masked_fill(~shown, -1)
            unseen = ~(named[:, None] == seen[:, None]).any(2)  # (n, all)
            first = (named == named[:, None]).float().argmax(1) == torch.arange(len(named))  # not what is there twice
            bounds = 1 / (unseen & first).sum(1)
            rivals = named != named[predicted.targets][:, None]
            local, everything = present_rows(group.local(modality), draw, modality), torch.arange(len(named))
            for predictor, some in ((name, slice(None)), (f"multimodal_{name}", predicted.joint)):
                if predictor in objectives.predictors and len(bounds[some]):
                    scores = objectives.scores(tokens, predictor, predicted.outputs[some], local,
                                               everything.expand(len(bounds[some]), -1))
                    true = scores.gather(1, predicted.targets[some][:, None])
                    hits = ((scores < true) | ~rivals[some]).all(1)
                    self.excess[f"top1_{predictor}"][step] += (hits.float() - bounds[some]).tolist()


def _held_out(line, config, pairs):
    """Figure -> (held-out one, most that chance allows)."""
    found = {}
    for name in (name for name in line if name.startswith("test_masked_top1_")):
        chance = 1 / (1 / line[name.replace("test_", "test_chance_")] - config.data.segments + 1)
        positions = 0.75 * sum(HELD_OUT_SHARDS)  # or more: at least one of a clip of two segments
        found[name] = line[name], chance + 3 * (chance * (1 - chance) / positions) ** 0.5
    if "test_pair_accuracy" in line:  # partners exchange sounds together: half as many decisions as pairs
        error = sum(0.25 / (count / 2) for count in pairs) ** 0.5 / len(pairs)
        found["test_pair_accuracy"] = line["test_pair_accuracy"], 0.5 + 3 * error
    return found
