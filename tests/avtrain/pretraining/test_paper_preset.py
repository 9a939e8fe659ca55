"""The paper preset trains on real clips, whole size, on one processor: takes minutes."""

import itertools
import json
import resource
import shutil
import time

import pytest
import torch

from avtrain.config import read_config
from avtrain.data.clips import ClipDataset
from avtrain.data.loader import batches
from avtrain.data.order import at_epoch, fixed_order
from avtrain.data.shards import open_folders
from avtrain.engine import Run
from avtrain.pretraining.draw import drawn, planned
from avtrain.pretraining.module import Pretraining, inputs_of
from avtrain.pretraining.optimizer import pretraining_optimizer
from avtrain.run_folder import RunFolder
from avtrain.runtime import choose_runtime, seed_everything

STEPS = 2


class _Same:
    """One batch, again and again."""

    def __init__(self, batch):
        self.batch = batch

    batch_size, parts = 2, 1

    def __len__(self):
        return 2 * STEPS

    def starting_at(self, first):
        while True:
            yield self.batch


@pytest.mark.slow
def test_steps_on_two_real_clips_lower_the_loss(media, avprep, tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    for name in ("pancake.mkv", "nasa.mp4"):
        shutil.copy(media / name, tmp_path / "raw")
    done = avprep("build", "--dataset", "folder", "--raw", tmp_path / "raw", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    config = read_config("paper", ["training.batch_size=2", "training.micro_batch=2", f"training.steps={STEPS}",
                                   "training.warmup=0", "training.log_every=1", "model.stages_recomputed=1",
                                   "objectives.pair=0"])
    folder = open_folders([str(tmp_path / "folder" / "train")])
    places = fixed_order([shard.clips for shard in folder.shards])
    dataset = ClipDataset(folder, config.data, 0)
    [wanted] = at_epoch([places], 0)
    [batch] = batches(dataset, [wanted], 0)
    assert len(batch.keys) == 2 and batch.visual_present.sum() > 4
    runtime = choose_runtime("cpu", "auto")
    seed_everything(0)
    network = Pretraining(config)

    def step(batch, part=0):
        torch.manual_seed(0)  # the same dropout and, below, the same masks and negatives: what is left is learning
        draw = drawn(planned(dataset, wanted), range(2), config.training.seed, 0, config.objectives.mask_rate,
                     config.objectives.draws, pairs=False)
        result = network(*inputs_of(batch, 2, runtime.device), draw)
        return result.loss, result.parts

    def loss_now():
        """As in training, of the same segments in the same BatchNorms, with nothing to run again."""
        with torch.no_grad(), runtime.autocast():
            return step(batch)

    began = time.monotonic()
    untrained, _ = loss_now()
    modules = {"model": network.model, "objectives": network.objectives}
    run = Run(RunFolder(tmp_path / "run"), modules, pretraining_optimizer(modules, config.training), config.training,
              lambda _: None)
    run.train(step, _Same(batch), runtime.autocast, dict)
    first = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last, parts = loss_now()
    losses = [line["loss"] for line in first] + [float(last)]
    with capsys.disabled():
        print(f"\npaper preset, {STEPS} steps on 2 clips of {int(batch.visual_present.sum())} segments: loss "
              f"{' -> '.join(f'{loss:.3f}' for loss in losses)}, {time.monotonic() - began:.0f} s, peak "
              f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    assert {"mep_visual", "mep_audio", "mep_multimodal"} <= set(parts) and first[-1]["skipped_steps"] == 0
    assert losses[0] == pytest.approx(float(untrained), rel=1e-4)  # what is compared differs by learning alone
    assert all(after < 0.99 * before for before, after in itertools.pairwise(losses))
    counts = {int(buffer) for name, buffer in network.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {STEPS + 2}
