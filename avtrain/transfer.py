"""A checkpoint transferred to a task: train on the training split, test on the test split, write what came out."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avtrain import __version__
from avtrain.checkpoint import load_config, load_model
from avtrain.config import Config, DataConfig, parse_override, read_config, section_values
from avtrain.data.shards import ShardFolder, open_folders
from avtrain.data.views import ListedClip, ViewDataset, Views, list_clips
from avtrain.errors import AvtrainError
from avtrain.features import view_features, weights_hash
from avtrain.files import written_whole
from avtrain.finetune import finetune, fixed_views, predict
from avtrain.metrics import confusion
from avtrain.models.avbert import AVBert
from avtrain.outcome import draw_confusion, git_commit, numbers, read_predictions, write_predictions
from avtrain.predictions import Predictions, ScoreSums, figures, mean_figures, targets_of
from avtrain.probes import linear_scores, neighbour_scores, standardized
from avtrain.released import load_released_parts
from avtrain.runtime import Runtime, seed_everything
from avtrain.tasks import TASKS, Protocol, Task, protocol_for

_SETTINGS, _SHARDS = "settings.json", "shards.json"
_RESULTS, _PREDICTIONS = "results.json", "predictions.jsonl"


@dataclass(frozen=True)
class Source:
    """What is transferred.

    Attributes:
        model: the network with its weights.
        data: what it takes.
        name: the checkpoint's path, or how it was drawn.
        sha256: of the checkpoint's file; empty for a random start.
        parts: which of visual, audio and transformers have learned something (of a random start: all count).
    """

    model: AVBert
    data: DataConfig
    name: str
    sha256: str
    parts: frozenset[str] = frozenset({"visual", "audio", "transformers"})

    def check_parts(self, modality: str, transformers: bool) -> None:
        """Raise AvtrainError where an answer would come from a part that has learned nothing."""
        wanted = {"visual": {"visual"}, "audio": {"audio"}}.get(modality, {"visual", "audio"})
        missing = sorted((wanted | ({"transformers"} if transformers else set())) - self.parts)
        if missing:
            names = {"visual": "a visual CNN", "audio": "an audio CNN", "transformers": "Transformers"}
            raise AvtrainError(f"{self.name}: {' and '.join(names[part] for part in missing)} would be needed, and it "
                               f"has learned only {' and '.join(names[part] for part in sorted(self.parts))}")


@dataclass(frozen=True)
class Trial:
    """One way to transfer to one task.

    Attributes:
        task: a key of `TASKS`.
        protocol_name: finetune, linear or knn.
        protocol: its settings.
        modality: visual, audio or both.
        validation: share of the training clips that is held out of training, by group, and only looked at.
        seed: of everything that is drawn.
    """

    task: str
    protocol_name: str
    protocol: Protocol
    modality: str
    validation: float = 0.0
    seed: int = 0


def load_source(checkpoint: Path, overrides: Iterable[str] = ()) -> Source:
    """Read a checkpoint of ours (.safetensors) or of the authors' release.

    Args:
        checkpoint: the file.
        overrides: `data.field=value`.

    Raises:
        AvtrainError: it is neither.
        OSError: the file can't be read.
    """
    if checkpoint.suffix == ".safetensors":
        model, data = load_model(checkpoint), load_config(checkpoint).data
        seen = ("visual", "audio") if data.modality == "both" else (data.modality,)
        parts = frozenset({"transformers", *seen})
    else:
        (model, parts), data = load_released_parts(checkpoint), DataConfig()
    values = {field: value for _, field, value in map(parse_override, overrides)}
    data = dataclasses.replace(data, **section_values("data", DataConfig, values))
    Config(model=model.config, data=data)  # checks that they go together
    with checkpoint.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return Source(model, data, str(checkpoint), digest.hexdigest(), parts)


def random_source(preset: str, overrides: Iterable[str], seed: int) -> Source:
    """A network at its random start.

    Args:
        preset: tiny, small, sound, paper, or a .toml file.
        overrides: `model.field=value` or `data.field=value`.
        seed: of its weights.
    """
    config = read_config(preset, overrides)
    seed_everything(seed)
    return Source(AVBert(config.model), config.data, f"random start of preset {preset}", "")


def evaluate_task(source: Source, trial: Trial, splits: list[str], root: Path, out: Path, cache: Path,
                  runtime: Runtime, resume: bool = False) -> dict[str, Any]:
    """Transfer to the splits of a task, one after the other.

    Args:
        source: what is transferred; it is not changed.
        trial: how.
        splits: keys of the task's splits.
        root: folder that holds the shards of datasets.
        out: folder of the results.
        cache: folder of frozen features.
        runtime: device and precision.
        resume: go on with what is in `out`.

    Returns:
        What stands in `out/results.json`.

    Raises:
        AvtrainError: shards are missing or don't fit, or `out` is not as `resume` says.
    """
    task = TASKS[trial.task]
    settings = {**dataclasses.asdict(trial), "views": _views_json(trial), "data": dataclasses.asdict(source.data),
                "model": dataclasses.asdict(source.model.config), "checkpoint": source.name,
                "checkpoint_sha256": source.sha256, "weights": weights_hash(source.model),
                "precision": str(runtime.autocast_dtype or torch.float32)}
    _check_folder(out, settings, trial, resume)
    of_splits, predicted, shards = [], {}, {}
    for split in splits:
        before, seen = _one_split(source, trial, split, root, out / f"split-{split}", cache, runtime, resume)
        predicted[split], shards[split] = before, seen
        of_splits.append(figures(before, seen["multi_label"], trial.seed))
    classes = next(iter(shards.values()))["classes"]
    results = {
        "task": trial.task, "protocol": trial.protocol_name, "modality": trial.modality,
        "splits": {split: numbers(of_split) for split, of_split in zip(splits, of_splits, strict=True)},
        "mean": numbers(mean_figures(of_splits)),
        "published": task.published, "source": task.source,
        "differs_from_published": _differences(task, trial, splits, len(classes)),
        "classes": len(classes), "settings": settings,
        "shards": {split: {name: entry[name] for name in ("train", "test", "fps", "videos")}
                   for split, entry in shards.items()},
        "version": __version__, "commit": git_commit()}
    write_predictions(out / _PREDICTIONS, predicted)
    if not next(iter(shards.values()))["multi_label"]:
        draw_confusion(out / "confusion.png", sum(
            (confusion(found.scores, found.single()) for found in predicted.values()),
            np.zeros((len(classes), len(classes)), np.int64)), classes)
    with written_whole(out / _RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def present_tasks(root: Path) -> dict[str, list[str]]:
    """Tasks with the splits whose shards are complete below `root`; of folder's, test or val, whichever there is."""
    found = {}
    for name, task in TASKS.items():
        splits = [split for split, (train, test) in task.splits.items()
                  if all((root / task.dataset / part / "index.json").is_file() for part in (*train, *test))]
        if splits:
            found[name] = splits if name != "folder" else splits[:1]
    return found


def splits_of(name: str, wanted: str, root: Path) -> list[str]:
    """The splits that "all" or a number stands for.

    Raises:
        AvtrainError: the task has no such split, or its shards are not there.
    """
    task = TASKS[name]
    if wanted != "all" and wanted not in task.splits:
        raise AvtrainError(f"--split {wanted}: {name} has {', '.join(task.splits)}, or all")
    splits = [wanted] if wanted != "all" else list(task.splits)
    if name == "folder" and wanted == "all":
        splits = present_tasks(root).get(name, splits[:1])
    for split in splits:
        for part in (part for parts in task.splits[split] for part in parts):
            index = root / task.dataset / part / "index.json"
            if not index.is_file():
                raise AvtrainError(f"no {index}: make it with `avprep build --dataset {task.dataset} --split {part}`, "
                                   "or name the folder that holds the shards with --shards")
    return splits


def _one_split(source: Source, trial: Trial, split: str, root: Path, out: Path, cache: Path, runtime: Runtime,
               resume: bool) -> tuple[Predictions, dict[str, Any]]:
    """Predictions of a split's test videos, and what is to be said of its shards."""
    task = TASKS[trial.task]
    locations = [[str(root / task.dataset / part) for part in parts] for parts in task.splits[split]]
    both = open_folders([*locations[0], *locations[1]])  # checks that classes and spec are the same everywhere
    train, test = (open_folders(part) for part in locations)
    _check_fit(both, source, trial)
    train_clips, test_clips = (_usable(folder, trial, part)
                               for folder, part in ((train, "training"), (test, "test")))
    learned, validation = held_out(train_clips, trial, task)
    parts = {"train": learned, "validation": validation, "test": test_clips}
    about = {"train": train.fingerprint, "test": test.fingerprint, "fps": both.spec["fps"],
             "classes": list(both.classes), "multi_label": both.multi_label,
             "videos": {part: len({clip.video for clip in clips}) for part, clips in parts.items()}}

    def finished(found: Predictions) -> tuple[Predictions, dict[str, Any]]:
        about["videos"]["unreadable"] = about["videos"]["test"] - len(found.videos)
        return found, about

    done = out / _PREDICTIONS
    _check_shards(out / _SHARDS, [train.fingerprint, test.fingerprint], resume)
    if resume and done.is_file():
        return finished(read_predictions(done))
    if trial.protocol_name == "finetune":
        classifier = finetune(copy.deepcopy(source.model), train, learned, validation, source.data, trial.protocol,
                              trial.modality, out, runtime, trial.seed, resume)
        found = predict(classifier, test, test_clips, source.data, trial.protocol, trial.modality, runtime)
    else:
        found = _probe(source, trial, locations, learned, test_clips, both, cache, runtime)
        if validation:
            on_validation = _probe(source, trial, [locations[0], locations[0]], learned, validation, both, cache,
                                   runtime)
            out.mkdir(parents=True, exist_ok=True)
            with written_whole(out / "metrics.jsonl") as temporary:
                temporary.write_text(json.dumps({f"validation_{name}": figure.value for name, figure in figures(
                    on_validation, both.multi_label, trial.seed).items()}) + "\n", encoding="utf-8")
    write_predictions(done, {split: found})
    return finished(read_predictions(done))  # rounded as they are written: the same when they are read by --resume


def _check_fit(folder: ShardFolder, source: Source, trial: Trial) -> None:
    """Raise where the protocol does not go with the shards or the model."""
    protocol = trial.protocol
    source.check_parts(trial.modality, protocol.sequence)
    if folder.multi_label != (protocol.loss == "binary"):
        raise AvtrainError(f"{trial.task}: its shards have {'several labels' if folder.multi_label else 'one label'} a "
                           f"clip, which does not go with transfer.loss={protocol.loss}")
    if not folder.classes:
        raise AvtrainError(f"{trial.task}: its shards have no classes")
    longest = source.model.config.max_segments
    if protocol.sequence and max(protocol.train_views, protocol.test_views) > longest:
        raise AvtrainError(f"transfer.train_views, transfer.test_views: the model has positions for {longest} segments")


def _usable(folder: ShardFolder, trial: Trial, part: str) -> list[ListedClip]:
    """The clips with a label. Of the training part those with the modality too; of the test part, others count as
    they are answered: from nothing."""
    clips = [clip for clip in list_clips(folder) if clip.labels or folder.multi_label]
    if not any(clip.labels for clip in clips):
        raise AvtrainError(f"{trial.task}: not one {part} clip has a label")
    perceived = [clip for clip in clips if clip.has(trial.modality)]
    if not perceived:
        what = "sound" if trial.modality == "audio" else "picture"
        raise AvtrainError(f"{trial.task}: not one {part} clip has {what}, which --modality {trial.modality} needs")
    return perceived if part == "training" else clips


def held_out(clips: list[ListedClip], trial: Trial, task: Task) -> tuple[list[ListedClip], list[ListedClip]]:
    """(to learn from, to validate on): the second is about the share `trial.validation`; no group is in both.

    Raises:
        AvtrainError: one of the parts would be empty.
    """
    if not trial.validation:
        return clips, []
    groups: dict[str, list[ListedClip]] = {}
    for clip in clips:
        match = re.match(task.group, clip.key) if task.group else None
        groups.setdefault(match.group() if match else clip.video, []).append(clip)
    names = sorted(groups)
    chosen: set[str] = set()
    held = 0
    for index in np.random.default_rng([trial.seed, 1]).permutation(len(names)):
        if held >= trial.validation * len(clips):
            break
        chosen.add(names[index])
        held += len(groups[names[index]])
    parts = ([clip for name in names if (name in chosen) == wanted for clip in groups[name]]
             for wanted in (False, True))
    learned, validation = parts
    if not learned or not validation:
        raise AvtrainError(f"--validation {trial.validation}: {len(names)} groups of clips are too few to hold one out")
    return learned, validation


def _probe(source: Source, trial: Trial, locations: list[list[str]], train_clips: list[ListedClip],
           test_clips: list[ListedClip], folder: ShardFolder, cache: Path, runtime: Runtime) -> Predictions:
    """Linear or nearest neighbours, on features cached for each folder of shards by itself."""
    protocol, classes = trial.protocol, len(folder.classes)
    views = [Views(trial.modality, protocol.train_views), fixed_views(protocol, trial.modality)]
    (x, keys, labels), (test_x, test_keys, _) = (
        _rows_of(source, places, view, clips, cache, runtime)
        for places, view, clips in zip(locations, views, (train_clips, test_clips), strict=True))
    targets = targets_of(labels, classes, folder.multi_label)
    if protocol.standardize:
        x, test_x = standardized(x, test_x)
    if trial.protocol_name == "linear":
        scores = linear_scores(x, targets, test_x, classes, protocol, trial.seed, runtime.device)
    else:
        (x, first), (test_x, first_test) = _means_by_clip(x, keys), _means_by_clip(test_x, test_keys)
        test_keys = [test_keys[row] for row in first_test]
        scores = neighbour_scores(x, targets[first], test_x, classes, protocol)
    sums = ScoreSums(test_clips, classes)
    sums.add(test_keys, scores)
    return sums.predictions()


def _rows_of(source: Source, locations: list[str], views: Views, clips: list[ListedClip], cache: Path,
             runtime: Runtime) -> tuple[torch.Tensor, list[str], list[list[int]]]:
    """Features, keys and labels of the views of these clips."""
    parts = [
        view_features(source.model, ViewDataset(open_folders([location]), source.data, views, None), runtime, cache)
        for location in locations]
    wanted = {clip.key for clip in clips}
    keys = [key for part in parts for key in part.keys]
    labels = [one for part in parts for one in part.labels]
    rows = [row for row, key in enumerate(keys) if key in wanted]
    return torch.cat([part.pooled for part in parts])[rows], [keys[row] for row in rows], [labels[row] for row in rows]


def _means_by_clip(x: torch.Tensor, keys: list[str]) -> tuple[torch.Tensor, list[int]]:
    """Features averaged over each clip's views; and the first row of each clip."""
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    number = {key: index for index, key in enumerate(first)}
    of_rows = torch.tensor([number[key] for key in keys])
    sums = torch.zeros(len(first), x.shape[1]).index_add(0, of_rows, x)
    return sums / of_rows.bincount()[:, None], list(first.values())


def _views_json(trial: Trial) -> dict[str, Any]:
    views = dataclasses.asdict(fixed_views(trial.protocol, trial.modality))
    return {name: views[name] for name in ("clips", "crops", "sequence")}


def _differences(task: Task, trial: Trial, splits: list[str], classes: int) -> list[str]:
    """What makes a number another one than the published: short phrases; the network itself is not looked at."""
    found = []
    if task.classes not in (0, classes):
        found.append(f"{classes} of {task.classes} classes")
    if not task.published:
        return found
    if trial.modality != task.modality:
        found.append(f"{trial.modality} instead of {task.modality}")
    if trial.protocol_name != task.protocol:
        found.append(f"{trial.protocol_name} instead of {task.protocol}")
    else:
        theirs = dataclasses.asdict(protocol_for(trial.task, trial.protocol_name, "published"))
        others = [name for name, value in dataclasses.asdict(trial.protocol).items() if value != theirs[name]]
        found += [f"other {', '.join(others)}"] if others else []
    if len(splits) < len(task.splits):
        found.append(f"{len(splits)} of {len(task.splits)} splits")
    if trial.validation:
        found.append("a part of training held out")
    return found


def _check_shards(path: Path, fingerprints: list[str], resume: bool) -> None:
    """Raise where a split was begun on other shards; else write down on which."""
    if resume and path.is_file() and json.loads(path.read_text(encoding="utf-8")) != fingerprints:
        raise AvtrainError(f"--resume: {path.parent} was begun on other shards; choose another folder with --out")
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(fingerprints) + "\n", encoding="utf-8")


def _check_folder(out: Path, settings: dict[str, Any], trial: Trial, resume: bool) -> None:
    path = out / _SETTINGS
    settings = json.loads(json.dumps(settings))  # tuples as lists
    settings["data"].pop("workers")  # how batches are made does not change them
    if resume:
        if not path.is_file():
            raise AvtrainError(f"--resume: no evaluation in {out}")
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != settings:
            names = ", ".join(sorted(name for name in settings if before.get(name) != settings[name]))
            raise AvtrainError(f"--resume: {names} differ from those in {path}; use the same checkpoint and options")
        return
    results = [*out.glob(_RESULTS)] if trial.protocol_name == "finetune" else []  # others take seconds to make again
    if [*out.glob("split-*/checkpoints"), *results]:
        raise AvtrainError(f"{out} holds an evaluation already: go on with --resume, or choose another folder with "
                           "--out")
    for old in out.glob("split-*/" + _PREDICTIONS):
        old.unlink()
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
