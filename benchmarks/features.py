"""Features of as many clips as Kinetics-700 and AudioSet's share have: what a linear probe, the neighbours and `embed`
hold of them. Everything that is held a clip or a view is there in full; only the vectors are short, for they stay in
files, and what is read of them at once is counted in bytes (tests/avtrain/transfer/test_parts.py has long ones)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import Row, share_of
from benchmarks.manifest import CLIPS, make_folder

_MOST_MIB = 1600.0  # of 1907, 2 GB: what is read of long vectors at once takes up to 300
_MEASURE = """
import re, sys
from pathlib import Path
import numpy as np
import torch
from avtrain.data.order import batches_of, fixed_order
from avtrain.data.shards import open_folders
from avtrain.transfer.feature_file import ClipMeans, FeatureRows, feature_file, mean_and_std
from avtrain.transfer.predictions import ScoreSums, targets_of
from avtrain.transfer.probes import linear_scores, neighbour_scores
from avtrain.transfer.protocols import Linear, Neighbours
from avtrain.transfer.splits import usable_clips
from avtrain.turns import Turns

out, what, views, channels, tested = Path(sys.argv[1]), sys.argv[2], 10, 4, 20_000

def peak_mib():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10

def make():
    for clips in np.array_split(np.arange(folder.clips), 500):
        numbers = np.repeat(clips, views)
        yield numbers, {"pooled": torch.from_numpy(np.sin(numbers[:, None] * np.arange(1, 1 + channels)))}

folder = open_folders([str(out)])
places = batches_of(fixed_order(folder.clips_of_shards), 16)
file = feature_file(out / "f.npy", {"pooled": channels}, folder.clips, lambda: Turns(make()))
clips, classes = usable_clips(folder, "both", "training"), len(folder.classes)
rows = FeatureRows.of_clips([file], "pooled", [folder.clips], clips.numbers())
rows = rows.scaled(mean_and_std(rows))
few = FeatureRows.of_clips([file], "pooled", [folder.clips], np.arange(tested))
labels, keys = folder.rows.labels(), folder.rows.keys()

def targets(numbers):
    return targets_of([labels[number] for number in numbers.tolist()], classes, folder.multi_label)

if what == "linear":
    asked, protocol = few, Linear(epochs=1, batch_size=8192, head_rate=0.001)
    [scores] = linear_scores(rows, lambda some: targets(rows.clips[some]), [few], classes, protocol, 0,
                             torch.device("cpu"))
else:
    means, asked = ClipMeans(rows), ClipMeans(few)
    scores = neighbour_scores(means, lambda some: targets(means.clips[some]), asked, classes, Neighbours())
sums = ScoreSums(clips[:tested], classes)
for part, some in scores:
    sums.add([keys[clip] for clip in asked.clips[part].tolist()], some)
assert len(rows) == views * len(clips) and len(sums.predictions().videos) == tested
print(len(clips), peak_mib())
"""


def run() -> list[Row]:
    """Peak memory of a process, all of it, for each protocol."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        make_folder(Path(scratch), CLIPS)
        for what in ("linear", "knn"):
            done = subprocess.run([sys.executable, "-c", _MEASURE, scratch, what], check=True, stdout=subprocess.PIPE,
                                  text=True)
            clips, mib = done.stdout.split()
            assert int(clips) == CLIPS
            found.append(share_of(f"{what} on {CLIPS:,} clips, memory / bound", "MiB", float(mib), _MOST_MIB, 1.0))
    return found
