"""The paper preset trains on real clips, whole size, on one processor: takes minutes."""

import json
import resource
import shutil
import time
from dataclasses import replace

import pytest
import torch

from avtrain.config import read_config
from avtrain.data.clips import ClipDataset
from avtrain.data.loader import batches
from avtrain.data.order import at_epoch, fixed_order
from avtrain.data.shards import open_folders
from avtrain.engine import Run
from avtrain.models.avbert import AVBert
from avtrain.pretraining.objectives import Objectives
from avtrain.pretraining.optimizer import pretraining_optimizer
from avtrain.run_folder import RunFolder
from avtrain.runtime import choose_runtime, seed_everything

STEPS = 2


class _Same:
    """One batch, again and again."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return STEPS

    def starting_at(self, epoch, batch):
        while True:
            yield self.batch


@pytest.mark.slow
def test_steps_on_two_real_clips_lower_the_loss(media, avprep, tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    for name in ("pancake.mkv", "nasa.mp4"):
        shutil.copy(media / name, tmp_path / "raw")
    done = avprep("build", "--dataset", "folder", "--raw", tmp_path / "raw", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    config = read_config("paper", ["training.batch_size=2", f"training.steps={STEPS}", "training.warmup=0"])
    assert config.model.segments_at_once  # activation checkpointing
    folder = open_folders([str(tmp_path / "folder" / "train")])
    places = fixed_order([shard.clips for shard in folder.shards])
    [batch] = batches(ClipDataset(folder, config.data, 0), at_epoch([places], 0), 0)
    assert len(batch.keys) == 2 and batch.visual_present.sum() > 4
    runtime = choose_runtime("cpu", "auto")
    generator = seed_everything(0)
    model = AVBert(config.model)
    objectives = Objectives(config.model, replace(config.objectives, pair=0.0))  # a pair exchanged hides all masks

    def step(batch):
        torch.manual_seed(0)  # the same dropout and, below, the same masks: what is left is learning
        result = objectives(model, model.embed(*batch.tensors(runtime.device)), torch.Generator().manual_seed(0))
        return result.loss, {name: float(value) for name, value in result.parts.items()}

    began = time.monotonic()
    modules = {"model": model, "objectives": objectives}
    run = Run(RunFolder(tmp_path / "run"), modules, pretraining_optimizer(modules, config.training), config.training,
              generator, lambda _: None)
    run.train(step, _Same(batch), runtime.autocast, dict)
    first = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    with torch.no_grad(), runtime.autocast():
        last, parts = step(batch)
    losses = [line["loss"] for line in first] + [float(last)]
    with capsys.disabled():
        print(f"\npaper preset, {STEPS} steps on 2 clips of {int(batch.visual_present.sum())} segments: loss "
              f"{' -> '.join(f'{loss:.3f}' for loss in losses)}, {time.monotonic() - began:.0f} s, peak "
              f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    assert {"mep_visual", "mep_audio", "mep_multimodal"} <= set(parts) and first[-1]["skipped_steps"] == 0
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
