"""What is learned from features that are read in parts: the same as from all at once, in memory that does not grow."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from avtrain.transfer.feature_file import ClipMeans, FeatureRows, feature_file, mean_and_std
from avtrain.transfer.probes import linear_scores, neighbour_scores
from avtrain.transfer.protocols import Linear, Neighbours
from avtrain.turns import Turns

CHANNELS, CLASSES = 24, 5


@pytest.fixture
def in_small_parts(monkeypatch):
    """Parts of a few rows, where all would fit into one."""
    def small(rows=7):
        monkeypatch.setattr("avtrain.transfer.feature_file._PART_BYTES", 4 * CHANNELS * rows)
        monkeypatch.setattr("avtrain.transfer.probes._BLOCK", (100, 4 * CHANNELS * rows))
        monkeypatch.setattr("avtrain.transfer.probes._COMPARED_AT_ONCE", 3)
    return small


def _file(folder, name, clips, seed, views=3):
    """A file of random vectors, around the mean of their clip's class, for clips of any numbers of views."""
    random = np.random.default_rng(seed)
    numbers = np.repeat(np.arange(clips), random.integers(1, views + 1, clips))
    vectors = random.normal(size=(len(numbers), CHANNELS)) * np.linspace(0.1, 9, CHANNELS) + 3
    vectors[np.arange(len(numbers)), numbers % CLASSES] += 20
    tensor = torch.from_numpy(vectors.astype(np.float32))
    made = [(numbers[some], {"pooled": tensor[some]}) for some in np.array_split(np.arange(len(numbers)), 4)]
    return feature_file(folder / f"{name}.npy", {"pooled": CHANNELS}, clips, lambda: Turns(made)), tensor


def _rows(folder, clips=40, seed=0, wanted=None):
    """Rows of two files, and the same in memory with the clip of each."""
    found = [_file(folder, f"{seed}-{number}", clips, seed + number) for number in range(2)]
    wanted = np.arange(2 * clips) if wanted is None else np.asarray(wanted)
    rows = FeatureRows.of_clips([file for file, _ in found], "pooled", [clips, clips], wanted)
    of_all = np.concatenate([found[0][0].clips, found[1][0].clips + clips])
    kept = np.isin(of_all, wanted)
    return rows, torch.cat([tensor for _, tensor in found])[kept], of_all[kept]


def test_rows_are_read_in_any_order_from_several_files(tmp_path, in_small_parts):
    rows, whole, clips = _rows(tmp_path, wanted=[3, 4, 39, 40, 41, 77])
    assert len(rows) == len(whole) and rows.clips.tolist() == clips.tolist() and rows.channels == CHANNELS
    which = np.random.default_rng(0).permutation(len(rows))
    assert torch.equal(rows[which], whole[which]) and torch.equal(rows[2:5], whole[2:5])
    in_small_parts(4)
    assert [len(rows[part]) for part in rows.parts()][:2] == [4, 4]
    assert torch.equal(torch.cat([rows[part] for part in rows.parts()]), whole)


def test_channels_are_scaled_as_they_would_be_in_one(tmp_path, in_small_parts):
    rows, whole, _ = _rows(tmp_path)
    mean, std = mean_and_std(rows)
    assert torch.equal(mean, whole.mean(0)) and torch.equal(std, whole.std(0, correction=0))  # one part: to the bit
    assert torch.equal(rows.scaled((mean, std))[:], (whole - mean) / std)
    in_small_parts()
    mean, std = mean_and_std(rows)
    torch.testing.assert_close(mean.double(), whole.double().mean(0), atol=0, rtol=1e-6)
    torch.testing.assert_close(std.double(), whole.double().std(0, correction=0), atol=0, rtol=1e-6)


def test_clips_are_the_mean_of_their_rows(tmp_path, in_small_parts):
    rows, whole, clips = _rows(tmp_path, wanted=range(3, 70))
    means = ClipMeans(rows)
    wanted = torch.stack([whole[clips == clip].mean(0) for clip in range(3, 70)])
    assert means.clips.tolist() == list(range(3, 70))
    torch.testing.assert_close(means[:], wanted)
    in_small_parts(2)  # a clip of three rows is not cut
    torch.testing.assert_close(means[:], wanted)
    torch.testing.assert_close(torch.cat([means[part] for part in means.parts(9, 10**6)]), wanted)


def test_neighbours_are_the_same_block_by_block(tmp_path, in_small_parts):
    train, test = ClipMeans(_rows(tmp_path)[0]), ClipMeans(_rows(tmp_path, 15, seed=7)[0])
    protocol = Neighbours(neighbours=9)

    def scores():
        parts = list(neighbour_scores(train, lambda rows: torch.from_numpy(train.clips[rows] % CLASSES), test, CLASSES,
                                      protocol))
        assert np.concatenate([np.arange(len(test))[part] for part, _ in parts]).tolist() == list(range(len(test)))
        return torch.cat([some for _, some in parts])

    similarity = F.normalize(test[:], dim=1) @ F.normalize(train[:], dim=1).T
    wanted = torch.zeros(len(test), CLASSES)
    for row, cosines in enumerate(similarity.numpy()):
        for clip in np.argsort(-cosines)[:9]:
            wanted[row, train.clips[clip] % CLASSES] += float(np.exp((cosines[clip] - 1) / 0.07))
    wanted /= wanted.sum(1, keepdim=True)
    torch.testing.assert_close(scores(), wanted, atol=1e-5, rtol=1e-5)
    in_small_parts()
    torch.testing.assert_close(scores(), wanted, atol=1e-5, rtol=1e-5)


def test_neighbours_of_several_labels(tmp_path):
    means = ClipMeans(_rows(tmp_path)[0])
    several = (torch.arange(len(means))[:, None] % torch.arange(2, 2 + CLASSES) == 0).float()
    [(_, scores)] = neighbour_scores(means, lambda rows: several[rows], means, CLASSES, Neighbours(neighbours=1))
    assert torch.equal(scores, several)  # each clip is its own nearest


def test_a_linear_classifier_is_the_same_from_a_file(tmp_path, in_small_parts):
    """Rows are drawn and scaled as when all of them were in memory: the very same weights."""
    rows, whole, clips = _rows(tmp_path)
    labels = torch.from_numpy(clips % CLASSES)
    protocol = Linear(epochs=6, batch_size=8, head_rate=0.05, dropout=0.1)
    device = torch.device("cpu")
    [scores] = linear_scores(rows, lambda some: labels[some], [rows], CLASSES, protocol, 3, device)
    [(part, found)] = scores
    assert part == slice(0, len(rows))
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    layer = torch.nn.Linear(CHANNELS, CLASSES)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05, eps=protocol.adam_eps, weight_decay=protocol.weight_decay)
    steps, step = 6 * -(-len(whole) // 8), 0
    for _ in range(6):
        for some in torch.randperm(len(whole), generator=generator).split(8):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
            loss = F.cross_entropy(layer(F.dropout(whole[some], 0.1)), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    with torch.no_grad():
        assert torch.equal(found, layer(whole).softmax(-1))
    in_small_parts()
    [scores] = linear_scores(rows, lambda some: labels[some], [rows], CLASSES, protocol, 3, device)
    torch.testing.assert_close(torch.cat([some for _, some in scores]), found, atol=1e-5, rtol=1e-4)


# In a process of its own, whose peak is not that of others before it. All rows would be 246 MB, or 184 of embeddings.
_AT_SIZE = """
import json, re, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
from avtrain.transfer.embeddings import write_table
from avtrain.transfer.feature_file import ClipMeans, FeatureRows, feature_file, mean_and_std
from avtrain.transfer.features import Outputs
from avtrain.transfer.probes import linear_scores, neighbour_scores
from avtrain.transfer.protocols import Linear, Neighbours
from avtrain.turns import Turns
import pyarrow.parquet

torch.set_num_threads(1)
out, rows, channels, views, classes = Path(sys.argv[1]), 20_000, 3072, 2, 50
random = np.random.default_rng(0)
drawn = torch.from_numpy(random.normal(size=(500, channels)).astype(np.float32))

def peak_mib():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10

def warm_up():  # what torch and pyarrow hold when they have run once
    layer = torch.nn.Linear(8, 8)
    layer(torch.zeros(4, 8)).sum().backward()
    torch.optim.Adam(layer.parameters()).step()

def make():
    for first in range(0, rows, 500):
        yield np.arange(first, first + 500) // views, {"pooled": drawn}

def outputs():
    for first in range(0, 20_000, 40):
        clips = np.arange(first // 10, first // 10 + 4)
        present = torch.ones(4, 10, dtype=torch.bool)
        batch = SimpleNamespace(keys=[f"clip-{clip}" for clip in clips], labels=[[1]] * 4, visual_present=present,
                                audio_present=present)
        yield Outputs(batch, clips, {name: drawn[:40, :768].view(4, 10, 768)
                                     for name in ("visual_local", "audio_local", "multimodal")})

warm_up()
found = {"before": peak_mib()}
folder = SimpleNamespace(spec={"segment_frames": 32, "fps": 16}, rows=[SimpleNamespace(start_s=0.0)] * 2000)
found["written"] = write_table(out / "f.parquet", 768, outputs(), folder)
found["embeddings"] = peak_mib()
file = feature_file(out / "f.npy", {"pooled": channels}, rows // views, lambda: Turns(make()))
all_rows = FeatureRows.of_clips([file], "pooled", [rows // views], np.arange(rows // views))
scaled = all_rows.scaled(mean_and_std(all_rows))
labels = torch.arange(rows // views) % classes
protocol = Linear(epochs=1, batch_size=128, head_rate=0.001)
[scores] = linear_scores(scaled, lambda some: labels[scaled.clips[some]], [scaled], classes, protocol, 0,
                         torch.device("cpu"))
found["linear_rows"] = sum(len(some) for _, some in scores)
found["linear"] = peak_mib()
means, few = ClipMeans(scaled), ClipMeans(FeatureRows.of_clips([file], "pooled", [rows // views], np.arange(600)))
found["knn_rows"] = sum(len(some) for _, some in neighbour_scores(means, lambda some: labels[some], few, classes,
                                                                  Neighbours()))
found["knn"] = peak_mib()
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process")
def test_20000_rows_at_full_size_take_a_part_of_their_memory(tmp_path):
    done = subprocess.run([sys.executable, "-c", _AT_SIZE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["written"], found["linear_rows"], found["knn_rows"]) == (20_000, 20_000, 600)
    assert found["embeddings"] - found["before"] < 90, found
    assert found["linear"] - found["before"] < 160, found
    assert found["knn"] - found["before"] < 320, found
    table = pq.ParquetFile(tmp_path / "f.parquet")
    assert table.metadata.num_rows == 20_000 and table.num_row_groups == 10
    [batch, *_] = table.iter_batches(batch_size=100)
    assert batch["visual"].type.list_size == 768 and batch["visual"].null_count == 0
