"""Between two lines of metrics nothing waits for the device: no number is read, no size depends on what it computed."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from avtrain.config import read_config
from avtrain.data.loader import Batch
from avtrain.engine import FiniteSteps
from avtrain.pretraining.draw import Clips, drawn
from avtrain.pretraining.module import Pretraining, inputs_of
from avtrain.pretraining.optimizer import pretraining_optimizer

NARROW = ["data.segments=4", "data.segment_frames=4", "data.crop=16", "data.scale=[16, 20]", "model.visual_width=8",
          "model.audio_width=8", "model.dimension=16", "model.heads=2", "model.feedforward=32", "model.rank=4",
          "objectives.negatives=6"]
# Reading a number is one operation, whether by item(), float() or bool(); the others give as much as there is.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
           "is_nonzero", "repeat_interleave"}


class Watched(TorchDispatchMode):
    """Notes the operations that would wait."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.partition("::")[2]
        masks = [index for index in (args[1] if name in ("index", "index_put", "index_put_") else ())
                 if index is not None and index.dtype in (torch.bool, torch.uint8)]
        if name in WAITING or masks:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def _step(preset, device="cpu", *more):
    """A network, and a part of a batch that lacks some of everything."""
    config = read_config(preset, [*(NARROW if preset == "tiny" else []), *more])
    torch.manual_seed(0)
    network = Pretraining(config).to(device).train()
    data, clips = config.data, 4
    seen, heard = torch.ones(2, clips, data.segments, dtype=torch.bool)
    seen[0], heard[1], seen[2, 2:], heard[2, 2:] = False, False, False, False
    names = [str(clip) for clip in range(clips)]
    read = [0, 1, 3]  # the third can't be read
    visual = torch.zeros(int(seen[read].sum()), 3, data.segment_frames, data.crop, data.crop, dtype=torch.uint8)
    audio = torch.randn(int(heard[read].sum()), 1, data.mels, data.mel_frames)
    batch = Batch(visual, audio, seen[read], heard[read], [], [names[clip] for clip in read], read)
    draw = drawn(Clips(seen, heard, names), range(clips), 0, 0, 0.4, config.objectives.draws)
    return network, inputs_of(batch, clips, torch.device(device)), draw.to(torch.device(device)), config


@pytest.mark.parametrize("more", [[], ["model.fusion=early"], ["model.fusion=late", "objectives.sampling=random"],
                                  ["model.stages_recomputed=1"], ["model.visual=slowfast50"]])
def test_no_operation_of_a_step_waits(more):
    network, inputs, draw, config = _step("tiny", "cpu", *more)
    modules = {"model": network.model, "objectives": network.objectives}
    optimizer, finite = pretraining_optimizer(modules, config.training), FiniteSteps([network], torch.device("cpu"))
    parameters = list(network.parameters())
    with Watched() as watched:
        for _ in range(2):
            result = network(*inputs, draw)
            result.loss.backward()
            result.figures()
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.found_inf = finite.after(result.loss.detach(), norm)
            optimizer.step()
            optimizer.zero_grad()
    assert watched.waits == []


@pytest.mark.parametrize("waits", [lambda x: float(x[0]), lambda x: bool((x > 0).all()), lambda x: x[x > 0],
                                   lambda x: x.nonzero(), lambda x: x.unique()])
def test_what_waits_is_found(waits):
    x = torch.randn(4)
    with Watched() as watched:
        waits(x)
    assert watched.waits


@pytest.mark.parametrize("preset", ["tiny", "small", "paper"])
def test_a_step_runs_where_there_are_shapes_alone(preset):
    """On meta tensors, which have no values to wait for."""
    network, inputs, draw, _ = _step(preset, "meta")
    loss = network(*inputs, draw).loss
    loss.backward()
    assert loss.is_meta and all(parameter.grad is not None for parameter in network.parameters())
