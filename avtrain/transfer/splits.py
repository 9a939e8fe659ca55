"""Which splits of a task there are, and which of their clips are learned from, validated on, tested on."""

from __future__ import annotations

import re

import numpy as np

from avtrain.data.manifest import ClipRows, video_of
from avtrain.data.shards import ShardFolder
from avtrain.data.storage import below, has_index, index_address, shown
from avtrain.errors import AvtrainError
from avtrain.transfer.tasks import TASKS


def present_tasks(root: str) -> dict[str, list[str]]:
    """Tasks with the splits whose shards are complete below `root`; of folder's, test or val, whichever there is."""
    found = {}
    for name, task in TASKS.items():
        splits = [split for split, (train, test) in task.splits.items()
                  if all(has_index(below(root, task.dataset, part)) for part in (*train, *test))]
        if splits:
            found[name] = splits if name != "folder" else splits[:1]
    return found


def splits_of(name: str, wanted: str, root: str) -> list[str]:
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
            folder = below(root, task.dataset, part)
            if not has_index(folder):
                raise AvtrainError(f"no {shown(index_address(folder))}: make it with `avprep build --dataset "
                                   f"{task.dataset} --split {part}`, or name the folder that holds the shards with "
                                   "--shards")
    return splits


def usable_clips(folder: ShardFolder, modality: str, part: str) -> ClipRows:
    """The clips with a label. Of the training part those with the modality too; of the test part, others count as
    they are answered: from nothing.

    Args:
        folder: shards of the part.
        modality: visual, audio or both.
        part: training or test.

    Raises:
        AvtrainError: there is not one with a label, or with the modality.
    """
    where = ", ".join(map(shown, folder.locations))
    labelled = folder.rows.have_label()
    if not labelled.any():
        raise AvtrainError(f"{where}: not one {part} clip has a label")
    clips = folder.rows if folder.multi_label else folder.rows.taken(labelled)
    perceived = clips.taken(clips.have(modality))
    if not perceived:
        what = "sound" if modality == "audio" else "picture"
        raise AvtrainError(f"{where}: not one {part} clip has {what}, which --modality {modality} needs")
    return perceived if part == "training" else clips


def held_out(clips: ClipRows, share: float, group: str, seed: int) -> tuple[ClipRows, ClipRows]:
    """(to learn from, to validate on); no group is in both.

    Args:
        clips: of the training part.
        share: about that part of them goes into the second list.
        group: pattern of the part of a key that belongs together; "": the source.
        seed: draws the groups.

    Raises:
        AvtrainError: one of the parts would be empty.
    """
    if not share:
        return clips, clips[:0]
    groups: dict[str, list[int]] = {}
    for number, key in enumerate(clips.keys()):
        match = re.match(group, key) if group else None
        groups.setdefault(match.group() if match else video_of(key), []).append(number)
    names = sorted(groups)
    chosen: set[str] = set()
    held = 0
    for index in np.random.default_rng([seed, 1]).permutation(len(names)):
        if held >= share * len(clips):
            break
        chosen.add(names[index])
        held += len(groups[names[index]])
    parts = ([number for name in names if (name in chosen) == wanted for number in groups[name]]
             for wanted in (False, True))
    learned, validation = parts
    if not learned or not validation:
        raise AvtrainError(f"--validation {share}: {len(names)} groups of clips are too few to hold one out")
    return clips.taken(learned), clips.taken(validation)
