"""Which precision is chosen, and that float16 trains."""

import pytest
import torch
from small_eval import NETWORK, invoke, settings

from avtrain import runtime
from avtrain.run_folder import RunFolder
from avtrain.runtime import choose_runtime


@pytest.mark.parametrize(("capability", "expected"), [
    ((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16), ((7, 0), torch.float16),
    ((6, 1), None)])
def test_auto_takes_what_a_gpu_has_itself(monkeypatch, capability, expected):
    """A100 and later; T4; V100; P40. torch says of all of them that bfloat16 is supported, for it can be emulated."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "empty", lambda *arguments, **options: None)
    chosen = choose_runtime("cuda:0", "auto")
    assert chosen.autocast_dtype == expected and chosen.scaled == (expected == torch.float16)
    assert choose_runtime("cuda:0", "float32").autocast_dtype is None


@pytest.mark.parametrize(("has", "expected"), [(True, torch.bfloat16), (False, None)])
def test_auto_takes_what_a_cpu_has(monkeypatch, has, expected):
    monkeypatch.setattr(runtime, "_cpu_has_bfloat16", lambda: has)
    assert choose_runtime("cpu", "auto").autocast_dtype == expected
    assert choose_runtime("cpu", "float16").scaled


@pytest.mark.slow
def test_float16_trains_as_float32_does_and_goes_on_exactly(demo_shards, tmp_path):
    def lines(name, precision, *more):
        wanted = [*NETWORK, "training.batch_size=4", "training.steps=8", "training.evaluate_every=4"]
        done = invoke("pretrain", "--shards", demo_shards, "--preset", "tiny", "--out", tmp_path / name, "--device",
                      "cpu", "--precision", precision, *settings(wanted), *more)
        assert done.exit_code == 0, (done.output, done.exception)
        return RunFolder(tmp_path / name).lines()

    half, single = lines("half", "float16"), lines("single", "float32")
    assert [line["loss"] for line in half] == pytest.approx([line["loss"] for line in single], rel=0.02)
    assert [line["gradient_norm"] for line in half] == pytest.approx(
        [line["gradient_norm"] for line in single], rel=0.3)
    assert half[-1]["skipped_steps"] < 8 and half[-1]["loss"] != single[-1]["loss"]
    lines("parts", "float16", "--max-steps", 3)
    found = {line["step"]: line for line in lines("parts", "float16")}
    assert all(found[line["step"]]["loss"] == line["loss"] for line in half)
    assert RunFolder(tmp_path / "parts").load()["loss_scale"]["scale"] > 1
