"""What is held in memory does not grow with the number of epochs."""

import json
import statistics
import subprocess
import sys

import psutil
import pytest

EPOCHS, MOST_GROWTH_MIB = 10, 6
# In a process of its own: the tests' own process holds what other tests have left. A clip is 0.5 MiB of pixels and as
# much of log-mel: who keeps one an epoch has grown by more than the limit at the end. Pages that processes share count
# once (pss: each its part); those of files, such as torch's libraries, do not, as anyone may share them. Workers are
# caught at any point of their work, hence the median over an epoch; and page by page they get their own copies of what
# they were forked with, which takes about 15 epochs and has an end.
EPOCHS_OF_A_FOLDER = """
import gc, json, re, statistics, sys
from pathlib import Path
import psutil
from avtrain.config import DataConfig
from avtrain.data.clips import ClipDataset
from avtrain.data.loader import batches
from avtrain.data.order import at_epoch, batches_of, epoch_order
from avtrain.data.shards import open_folders

location, workers, epochs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
folder = open_folders([location])
dataset = ClipDataset(folder, DataConfig(segment_frames=4, crop=56, scale=(64, 80)), 0)
process, clips, seen_mib, places = psutil.Process(), 0, [], []

def held_kib(pid):
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kib) for kib in re.findall(r"Pss_(?:Anon|Shmem): +([0-9]+) kB", rollup))

for epoch in range(epochs):
    of_epoch = batches_of(epoch_order([shard.clips for shard in folder.shards], 0, epoch, 8), 2)
    places += at_epoch(of_epoch, epoch)
gc.collect()
gc.freeze()  # what was imported stays, and need not be gone through after every batch
for batch in batches(dataset, places, workers):
    clips += len(batch.keys)
    gc.collect()
    seen_mib.append(sum(held_kib(one.pid) for one in [process, *process.children()]) / 2**10)
sizes_mib = [statistics.median(seen_mib[epoch * len(of_epoch):(epoch + 1) * len(of_epoch)]) for epoch in range(epochs)]
print(json.dumps([clips, folder.clips, sizes_mib]))
"""


@pytest.mark.skipif(not psutil.LINUX, reason="only Linux tells how memory is shared")
@pytest.mark.parametrize(("workers", "warm_up"), [(0, 5), pytest.param(2, 25, marks=pytest.mark.slow)])
def test_memory_is_flat_over_ten_epochs(demo_shards, workers, warm_up):
    done = subprocess.run([sys.executable, "-c", EPOCHS_OF_A_FOLDER, str(demo_shards / "train"), str(workers),
                           str(warm_up + EPOCHS + 1)],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    clips, clips_of_an_epoch, sizes_mib = json.loads(done.stdout)
    assert clips == (warm_up + EPOCHS + 1) * clips_of_an_epoch
    sizes_mib = sizes_mib[warm_up:-1]  # in the last epoch workers end, and the others share with fewer
    assert statistics.median(sizes_mib[-3:]) - max(sizes_mib[:2]) < MOST_GROWTH_MIB, [round(size) for size in sizes_mib]
