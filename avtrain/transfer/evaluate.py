"""A checkpoint transferred to a task: train on the training split, test on the test split, write what came out."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from avtrain import __version__, ranks
from avtrain.config import HOW_MADE, DataConfig, config_from, config_to
from avtrain.data.loader import MOST_UNREADABLE
from avtrain.data.manifest import ClipRows
from avtrain.data.shards import ShardFolder, joined, open_folder
from avtrain.data.storage import below
from avtrain.data.views import Views
from avtrain.errors import AvtrainError, TaskFailed
from avtrain.fields import kinds_of
from avtrain.retired import current_names
from avtrain.run_folder import RunFolder, check_settings, delete, read_settings, write_settings
from avtrain.runtime import Runtime
from avtrain.transfer.feature_file import ClipMeans, FeatureRows, Numbers, mean_and_std
from avtrain.transfer.features import view_features, weights_hash
from avtrain.transfer.finetune import finetune, fixed_views, predict
from avtrain.transfer.metrics import confusion
from avtrain.transfer.predictions import Predictions, ScoreSums, mean_metrics, metrics_of, targets_of
from avtrain.transfer.probes import linear_scores, neighbour_scores
from avtrain.transfer.protocols import Finetune, Linear, Neighbours, Protocol, protocol_for
from avtrain.transfer.results import draw_confusion, git_commit, numbers, read_whole_predictions, write_predictions
from avtrain.transfer.splits import held_out, usable_clips
from avtrain.transfer.start import Start
from avtrain.transfer.tasks import TASKS, Task

_SETTINGS, _SHARDS = "settings.json", "shards.json"
_RESULTS, _CONFUSION = "results.json", "confusion.png"
_PREDICTIONS, _VALIDATION = "predictions.jsonl", "validation.jsonl"


@dataclass(frozen=True)
class Trial:
    """One way to transfer to one task.

    Attributes:
        task: a key of `TASKS`.
        protocol: its settings.
        modality: visual, audio or both.
        validation: share of the training clips that is held out of training, by group, and only looked at.
        seed: of everything that is drawn.
    """

    task: str
    protocol: Protocol
    modality: str
    validation: float = 0.0
    seed: int = 0


class Evaluated(NamedTuple):
    """What came of a transfer.

    Attributes:
        results: what stands in results.json.
        before: all of it was done by an earlier run.
    """

    results: dict[str, Any]
    before: bool


def evaluate_task(source: Start, trial: Trial, splits: list[str], root: str, out: Path, cache: Path,
                  runtime: Runtime, force: bool = False, wandb: str | None = None) -> Evaluated:
    """Transfer to the splits of a task, one after the other; what is done in `out` is not done again. Several processes
    share networks and clips; the first one writes, and fits what goes on frozen features.

    Args:
        source: what is transferred; it is not changed.
        trial: how.
        splits: keys of the task's splits.
        root: folder that holds the shards of datasets, or its address.
        out: folder of the results.
        cache: folder of frozen features.
        runtime: device and precision.
        force: begin these splits anew; what an earlier evaluation wrote of them, and of all splits together, is
            deleted.
        wandb: the project on Weights & Biases that gets the figures of finetuning; None: none.

    Raises:
        AvtrainError: shards are missing or don't fit, or what is in `out` was begun with other settings.
    """
    task = TASKS[trial.task]
    settings = {"protocol_name": trial.protocol.name, **dataclasses.asdict(trial), "views": _views_json(trial),
                "data": dataclasses.asdict(source.data), "model": dataclasses.asdict(source.model.config),
                "checkpoint": source.name, "checkpoint_sha256": source.sha256, "weights": weights_hash(source.model),
                "precision": str(runtime.autocast_dtype or runtime.dtype)}

    def begin() -> None:
        if force:
            _clear(out, trial, settings, splits)
        _check_folder(out, trial, settings)

    ranks.by_first(begin)
    opened = {part: open_folder(below(root, task.dataset, part))
              for part in dict.fromkeys(part for split in splits for parts in task.splits[split] for part in parts)}
    outcomes = {split: _one_split(source, trial, split, opened, out / f"split-{split}", cache, runtime, wandb)
                for split in splits}
    return ranks.by_first(lambda: _all_splits(source, trial, settings, outcomes, out))


def _all_splits(source: Start, trial: Trial, settings: dict[str, Any], outcomes: dict[str, _Outcome],
                out: Path) -> Evaluated:
    """Write what came of the splits together, where that isn't there."""
    task, splits = TASKS[trial.task], list(outcomes)
    if before := _finished_before(out, outcomes):
        return Evaluated(before, True)
    folder = next(iter(outcomes.values())).folder
    of_splits = [metrics_of(outcome.test, folder.multi_label, trial.seed) for outcome in outcomes.values()]
    results = {
        "task": trial.task, "protocol": trial.protocol.name, "modality": trial.modality,
        "splits": {split: numbers(of_split) for split, of_split in zip(splits, of_splits, strict=True)},
        "mean": numbers(mean_metrics(of_splits)),
        "validation": {split: numbers(metrics_of(outcome.validation, folder.multi_label, trial.seed))
                       for split, outcome in outcomes.items() if outcome.validation},
        "published": task.published, "source": task.source,
        "differs_from_published": _differences(task, trial, source.data, outcomes),
        "classes": len(folder.classes), "settings": settings,
        "shards": {split: outcome.shards for split, outcome in outcomes.items()},
        "version": __version__, "commit": git_commit()}
    write_predictions(out / _PREDICTIONS, {split: outcome.test for split, outcome in outcomes.items()})
    if not folder.multi_label:
        draw_confusion(out / _CONFUSION, sum(
            (confusion(outcome.test.scores, outcome.test.single()) for outcome in outcomes.values()),
            np.zeros((len(folder.classes), len(folder.classes)), np.int64)), folder.classes)
    write_settings(out / _RESULTS, results)
    return Evaluated(results, False)


@dataclass(frozen=True)
class _Outcome:
    """What came of a split.

    Attributes:
        test, validation: predictions of test videos, and of what was held out of training, if anything was.
        folder: all its shards; classes and spec are the same in both parts.
        shards: what results.json says of them.
        before: it was done by an earlier run.
    """

    test: Predictions
    validation: Predictions | None
    folder: ShardFolder
    shards: dict[str, Any]
    before: bool


def _one_split(source: Start, trial: Trial, split: str, opened: Mapping[str, ShardFolder], out: Path, cache: Path,
               runtime: Runtime, wandb: str | None) -> _Outcome:
    """Train and test on one split, or read what was found before; `opened` are the dataset's folders."""
    task = TASKS[trial.task]
    of_train, of_test = ([opened[part] for part in parts] for parts in task.splits[split])
    both = joined([*of_train, *of_test])  # checks that classes and spec are the same everywhere
    train, test = joined(of_train), joined(of_test)
    _check_fit(both, source, trial)
    test_clips = usable_clips(test, trial.modality, "test")
    learned, validation = held_out(usable_clips(train, trial.modality, "training"), trial.validation, task.group,
                                   trial.seed)
    done, looked_at = out / _PREDICTIONS, out / _VALIDATION

    def is_done() -> bool:
        _check_shards(out, [train.fingerprint, test.fingerprint])
        return done.is_file() and (looked_at.is_file() or not validation)

    before = ranks.by_first(is_done)
    if not before:
        asked = [(test, test_clips), *([(train, validation)] if validation else [])]
        protocol = trial.protocol
        if isinstance(protocol, Finetune):
            classifier = finetune(copy.deepcopy(source.model), source.parts, train, learned, validation, source.data,
                                  protocol, trial.modality, out, runtime, trial.seed, wandb)
            finetuned = [predict(classifier, folder, clips, source.data, protocol, trial.modality, runtime)
                         for folder, clips in asked]
            ranks.by_first(lambda: _write(trial, split, finetuned, out))
        else:
            frozen = _frozen(source, trial, protocol, [(train, learned), *asked], cache, runtime)
            ranks.by_first(lambda: _write(trial, split, _probe(trial, protocol, train, asked, frozen, runtime), out))
    # Rounded as they were written: going on finds the same.
    on_test = read_whole_predictions(done, test_clips, len(both.classes), MOST_UNREADABLE * test.clips)
    on_validation = (read_whole_predictions(looked_at, validation, len(both.classes), MOST_UNREADABLE * train.clips)
                     if validation else None)
    videos = {part: len({clip.video for clip in clips})
              for part, clips in (("train", learned), ("validation", validation), ("test", test_clips))}
    return _Outcome(on_test, on_validation, both, {
        "train": train.fingerprint, "test": test.fingerprint, "fps": both.spec["fps"],
        "videos": {**videos, "unreadable": videos["test"] - len(on_test.videos)}}, before)


def _write(trial: Trial, split: str, found: list[Predictions], out: Path) -> None:
    """The predictions of a split's test clips, and of those of validation, if there are any."""
    if not all(np.isfinite(one.scores).all() for one in found):
        raise TaskFailed(trial.task, "outputs are not finite numbers; try a lower transfer.head_rate, or "
                         "--precision float32")
    for name, predicted in reversed([*zip((_PREDICTIONS, _VALIDATION), found, strict=False)]):
        write_predictions(out / name, {split: predicted})


def _check_fit(folder: ShardFolder, source: Start, trial: Trial) -> None:
    """Raise where the protocol does not go with the shards or the model."""
    protocol = trial.protocol
    source.check_parts(trial.modality, protocol.sequence)
    if not isinstance(protocol, Neighbours) and folder.multi_label != (protocol.loss == "binary"):
        labels = "several labels" if folder.multi_label else "one label"
        raise TaskFailed(trial.task, f"its shards have {labels} a clip, which does not go with "
                         f"transfer.loss={protocol.loss}")
    if not folder.classes:
        raise TaskFailed(trial.task, "its shards have no classes")
    longest = source.model.config.max_segments
    if protocol.sequence and max(protocol.train_views, protocol.test_views) > longest:
        raise AvtrainError(f"transfer.train_views, transfer.test_views: the model has positions for {longest} segments")


def _frozen(source: Start, trial: Trial, protocol: Linear | Neighbours, clips: list[tuple[ShardFolder, ClipRows]],
            cache: Path, runtime: Runtime) -> list[FeatureRows]:
    """Features of the clips to learn from, the first ones, and of those that are asked for; cached."""
    learned, *asked = clips
    of_train = Views(trial.modality, protocol.train_views, whole=protocol.test_whole)
    of_test = fixed_views(protocol, trial.modality)
    return [_rows_of(source, *learned, of_train, cache, runtime),
            *(_rows_of(source, *some, of_test, cache, runtime) for some in asked)]


def _probe(trial: Trial, protocol: Linear | Neighbours, known: ShardFolder, asked: list[tuple[ShardFolder, ClipRows]],
           frozen: list[FeatureRows], runtime: Runtime) -> list[Predictions]:
    """Linear or nearest neighbours on features: learned from the first ones, for each others."""
    train, *tests = frozen
    classes = len(known.classes)
    if protocol.standardize:
        scale = mean_and_std(train)
        train, *tests = (rows.scaled(scale) for rows in (train, *tests))
    labels = known.rows.labels()

    def targets(clips: Numbers) -> torch.Tensor:
        return targets_of([labels[clip] for clip in clips.tolist()], classes, known.multi_label)

    if isinstance(protocol, Linear):
        clips_of_tests = [rows.clips for rows in tests]
        scores = linear_scores(train, lambda rows: targets(train.clips[rows]), tests, classes, protocol, trial.seed,
                               runtime.device)
    else:
        means, *others = map(ClipMeans, (train, *tests))
        clips_of_tests = [of_test.clips for of_test in others]
        scores = [neighbour_scores(means, lambda rows: targets(means.clips[rows]), of_test, classes, protocol)
                  for of_test in others]
    found = []
    for (folder, clips), of_rows, parts in zip(asked, clips_of_tests, scores, strict=True):
        keys, sums = folder.rows.keys(), ScoreSums(clips, classes)
        for part, some in parts:
            sums.add([keys[clip] for clip in of_rows[part].tolist()], some)
        found.append(sums.predictions())
    return found


def _rows_of(source: Start, folder: ShardFolder, clips: ClipRows, views: Views, cache: Path,
             runtime: Runtime) -> FeatureRows:
    """Features of the views of these clips; cached for each folder of shards by itself."""
    folders = folder.joined_from or (folder,)
    files = [view_features(source.model, of_one, source.data, views, runtime, cache) for of_one in folders]
    return FeatureRows.of_clips(files, "pooled", [of_one.clips for of_one in folders], clips.numbers())


def _views_json(trial: Trial) -> dict[str, Any]:
    views = dataclasses.asdict(fixed_views(trial.protocol, trial.modality))
    return {name: views[name] for name in ("clips", "crops", "sequence")}


def _differences(task: Task, trial: Trial, data: DataConfig, outcomes: dict[str, _Outcome]) -> list[str]:
    """What makes a number another one than the published: short phrases; the network itself is not looked at."""
    folder = next(iter(outcomes.values())).folder
    found = []
    if task.classes not in (0, len(folder.classes)):
        found.append(f"{len(folder.classes)} of {task.classes} classes")
    if not task.published:
        return found
    if trial.modality != task.modality:
        found.append(f"{trial.modality} instead of {task.modality}")
    others = [f"data.{name}" for name in ("segment_frames", "crop", "scale")
              if trial.modality != "audio" and getattr(data, name) != getattr(DataConfig(), name)]
    if trial.protocol.name != task.protocol:
        found.append(f"{trial.protocol.name} instead of {task.protocol}")
    else:
        theirs = dataclasses.asdict(protocol_for(trial.task, trial.protocol.name, "published"))
        others = [name for name, value in dataclasses.asdict(trial.protocol).items() if value != theirs[name]] + others
    if others:
        found.append(f"other {', '.join(others)}")
    if task.fps not in (0, folder.spec["fps"]):
        found.append(f"{folder.spec['fps']:g} instead of {task.fps} frames a second")
    if len(outcomes) < len(task.splits):
        found.append(f"{len(outcomes)} of {len(task.splits)} splits")
    videos = sum(len(outcome.test.videos) for outcome in outcomes.values())
    wanted = sum(task.test_videos.get(split, 0) for split in outcomes)
    if wanted not in (0, videos):
        found.append(f"{videos} of {wanted} test videos")
    if trial.validation:
        found.append("a part of training held out")
    return found


def _check_folder(out: Path, trial: Trial, settings: dict[str, Any], anew: str = "--force") -> None:
    """Raise where the folder holds something else; write down the settings where there is nothing yet. `anew` is what
    is then said to begin anew."""
    path = out / _SETTINGS
    for name in HOW_MADE:
        settings["data"].pop(name, None)
    if not ((out / _RESULTS).is_file() or any(map(_has_begun, out.glob("split-*")))):
        write_settings(path, settings)
        return
    if not path.is_file():
        raise AvtrainError(f"{out} holds results of no `avtrain eval`, for {path} is not there: choose another folder "
                           "with --out")
    check_settings(out, _as_of_today(read_settings(path, anew=anew), trial, path), settings, anew)


def _as_of_today(before: dict[str, Any], trial: Trial, path: Path) -> dict[str, Any]:
    """Settings that an earlier version may have written: under today's names, and without what the protocol does not
    have."""
    config = config_to(config_from({name: before.get(name, {}) for name in ("model", "data")}, str(path)))
    for name in HOW_MADE:
        del config["data"][name]
    of_protocol = before.get("protocol")
    if isinstance(of_protocol, dict):
        known, of_protocol = kinds_of(type(trial.protocol)), current_names("transfer", of_protocol, written=True)
        of_protocol = {name: value for name, value in of_protocol.items() if name in known}
    return before | {"model": config["model"], "data": config["data"], "protocol": of_protocol}


def _check_shards(out: Path, fingerprints: list[str]) -> None:
    """Raise where a split was begun on other shards; else write down on which."""
    path = out / _SHARDS
    if path.is_file() and _has_begun(out):
        before = read_settings(path, list)
        check_settings(out, {"shards": before}, {"shards": fingerprints})
    else:
        write_settings(path, fingerprints)


def _has_begun(of_split: Path) -> bool:
    """Whether a split has something that would be lost."""
    return (of_split / _PREDICTIONS).is_file() or RunFolder(of_split).last_checkpoint() is not None


def _finished_before(out: Path, outcomes: dict[str, _Outcome]) -> dict[str, Any] | None:
    """What stands in results.json, if it is of these splits and nothing of them was made now."""
    path = out / _RESULTS
    if not (path.is_file() and all(outcome.before for outcome in outcomes.values())):
        return None
    try:
        found: dict[str, Any] = read_settings(path)
    except AvtrainError:  # it is written again, from the predictions
        return None
    shards = {split: outcome.shards for split, outcome in outcomes.items()}
    return found if list(found.get("splits", ())) == list(outcomes) and found.get("shards") == shards else None


def _clear(out: Path, trial: Trial, settings: dict[str, Any], splits: list[str]) -> None:
    """Delete what an evaluation of these splits writes. The settings last, by which it is known to be one; they stay
    where another split has begun with them.

    Raises:
        AvtrainError: another split has begun with other settings; nothing is deleted.
    """
    if not (out / _SETTINGS).is_file():
        return
    asked = [out / f"split-{split}" for split in splits]
    others = [of_split for of_split in sorted(out.glob("split-*")) if of_split not in asked and _has_begun(of_split)]
    if others:
        _check_folder(out, trial, settings, "--split all --force")
    for of_split in asked:
        RunFolder(of_split).clear()
        delete(of_split / name for name in (_PREDICTIONS, _VALIDATION, _SHARDS))
    delete(out / name for name in (_RESULTS, _PREDICTIONS, _CONFUSION, *(() if others else (_SETTINGS,))))
