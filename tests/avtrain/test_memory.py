"""What is held in memory does not grow with the number of epochs."""

import gc
import statistics

import psutil
import pytest

from avtrain.config import DataConfig
from avtrain.data.loader import ClipDataset, batches
from avtrain.data.order import batches_of, epoch_order
from avtrain.data.shards import open_folders

EPOCHS, MOST_GROWTH_MIB = 10, 6
# A clip is 0.5 MiB of pixels and as much of log-mel: who keeps one an epoch has grown by more than that at the end.
CONFIG = DataConfig(segment_frames=4, crop=56, scale=(64, 80))


@pytest.fixture(scope="module")
def folder(small_demo, avprep, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    done = avprep("build", "--dataset", "demo", "--raw", small_demo, "--out", out, "--shard-mb", 1.5)
    assert done.returncode == 0, done.stderr
    return open_folders([str(out / "demo" / "train")])


def _resident_mib():
    """Of this process and the workers it has. Pages that they share count once: pss, each process its part (Linux)."""
    gc.collect()
    process = psutil.Process()
    return sum(one.memory_full_info().pss for one in [process, *process.children()]) / 2**20


@pytest.mark.skipif(not psutil.LINUX, reason="only Linux tells how memory is shared")
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_flat_over_ten_epochs(folder, workers):
    dataset = ClipDataset(folder, CONFIG, 0)
    sizes_mib, clips = [], 0
    for epoch in range(EPOCHS):
        order = epoch_order([shard.clips for shard in folder.shards], 0, epoch, 8)
        seen_mib = []
        for batch in batches(dataset, batches_of(order, 2), epoch, workers):
            clips += len(batch.keys)
            seen_mib.append(_resident_mib())
        sizes_mib.append(statistics.median(seen_mib))  # workers are caught at any point of their work
    assert clips == EPOCHS * folder.clips
    # What is loaded and remembered at first, the first two epochs have seen.
    assert statistics.median(sizes_mib[-3:]) - max(sizes_mib[:2]) < MOST_GROWTH_MIB, [round(size) for size in sizes_mib]
