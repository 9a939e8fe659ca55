"""The datasets that avprep knows: one plain table, one file an adapter.

An adapter is two functions: `splits(raw)` says which splits are there, `find(raw, split)` lists the files with labels;
`list_split` completes the list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from avprep.datasets import audioset, charades, esc, folder, kinetics, ucf101
from avprep.datasets.source import Listing, complete


@dataclass(frozen=True)
class Dataset:
    """An entry of the table.

    Attributes:
        splits: raw folder -> names of the splits that are there.
        find: (raw folder, split) -> what the split lists.
        layout: what the raw folder should look like, one line.
        origin: where to get the data, one line.
    """

    splits: Callable[[Path], tuple[str, ...]]
    find: Callable[[Path, str], Listing]
    layout: str
    origin: str


_KINETICS_LAYOUT = ("train.csv, val.csv, test.csv (label,youtube_id,time_start,time_end,split), "
                    "and videos ID_SSSSSS_EEEEEE.mp4 in any sub-folder, or whole videos ID.*")
_KINETICS_ORIGIN = "github.com/cvdfoundation/kinetics-dataset"

DATASETS: dict[str, Dataset] = {
    "kinetics700": Dataset(kinetics.splits, kinetics.find, _KINETICS_LAYOUT, _KINETICS_ORIGIN),
    "kinetics600": Dataset(kinetics.splits, kinetics.find, _KINETICS_LAYOUT, _KINETICS_ORIGIN),
    "kinetics400": Dataset(kinetics.splits, kinetics.find, _KINETICS_LAYOUT, _KINETICS_ORIGIN),
    "kinetics-sounds": Dataset(folder.splits, folder.find, "train/CLASS/*.mp4, test/CLASS/*.mp4",
                               "Kinetics videos of the classes in the AVBERT or L3-Net paper"),
    "audioset": Dataset(audioset.splits, audioset.find,
                        "balanced_train_segments.csv, unbalanced_train_segments.csv, eval_segments.csv, "
                        "class_labels_indices.csv, and files ID.*, ID_START*.* or YID.* in any sub-folder",
                        "research.google.com/audioset"),
    "ucf101": Dataset(ucf101.splits, ucf101.find, "UCF-101/CLASS/*.avi, ucfTrainTestlist/*.txt",
                      "www.crcv.ucf.edu/data/UCF101.php"),
    "esc50": Dataset(esc.splits, esc.find_esc50, "audio/*.wav, meta/esc50.csv", "github.com/karolpiczak/ESC-50"),
    "esc10": Dataset(esc.splits, esc.find_esc10, "'NNN - CLASS'/FOLD-ID-TAKE.ogg, or ESC-50's audio/ and meta/",
                     "github.com/karolpiczak/ESC-10"),
    "charades": Dataset(charades.splits, charades.find,
                        "Charades_v1_train.csv, Charades_v1_test.csv, Charades_v1_classes.txt (beside the videos or "
                        "in Charades/), Charades_v1_480/ID.mp4", "prior.allenai.org/projects/charades"),
    "folder": Dataset(folder.splits, folder.find, "[SPLIT/]CLASS/**/*.mp4 (or .wav ...), or files without a class",
                      "your own files"),
    "demo": Dataset(folder.splits, folder.find, "train/CLASS/*.mp4, test/CLASS/*.mp4", "made by `avprep demo`"),
}


def list_split(dataset: str, raw: Path, split: str) -> Listing:
    """What a split of a dataset lists, nothing twice and every source under a key of its own."""
    return complete(DATASETS[dataset].find(raw, split))
