"""Settings, our checkpoints, and the command line around them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from avtrain.checkpoints.ours import load_checkpoint, save_model
from avtrain.cli import main
from avtrain.config import Config, config_from, config_to, read_config
from avtrain.errors import AvtrainError
from avtrain.models.avbert import AVBert


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = read_config("tiny")
    torch.manual_seed(0)
    save_model(tmp_path / "tiny.safetensors", AVBert(config.model), config)
    return tmp_path / "tiny.safetensors"


@pytest.mark.parametrize("preset", ["tiny", "small", "sound", "paper"])
def test_presets_survive_a_round_trip(preset: str) -> None:
    config = read_config(preset)
    assert config_from(config_to(config), "here") == config


def test_paper_preset_is_the_default_but_for_memory() -> None:
    assert read_config("paper", ["training.micro_batch=none"]) == Config()


def test_overrides() -> None:
    config = read_config("tiny", ["model.rank=none", "model.fusion=late", "model.dropout=0", "data.crop=36",
                                  "model.visual_blocks=[2, 2]", "model.share_layers=false"])
    model = config.model
    assert (model.rank, model.fusion, model.dropout, config.data.crop, model.visual_blocks, model.share_layers) == (
        None, "late", 0.0, 36, (2, 2), False)


@pytest.mark.parametrize(("override", "message"), [
    ("model.rnk=3", r"model\.rnk: no such setting; did you mean model\.rank\?"),
    ("modle.rank=3", r"modle: no such setting; did you mean model\?"),
    ("model.rank=1", "model.rank = 1: at least 2"),
    ("model.rank=true", "a whole number is wanted"),
    ("model.fusion=middle", "one of early, mid, late"),
    ("model.heads=7", "a divisor of model.dimension"),
    ("data.segments=40", "at most model.max_segments"),
    ("rank=3", "section.field=value"),
])
def test_wrong_settings_say_so(override: str, message: str) -> None:
    with pytest.raises(AvtrainError, match=message):
        read_config("tiny", [override])


def test_a_checkpoint_is_read_as_it_was_written(checkpoint: Path) -> None:
    model, config, parts = load_checkpoint(checkpoint)
    assert not model.training and config == read_config("tiny") and len(parts) == 3
    torch.manual_seed(0)
    for name, tensor in AVBert(read_config("tiny").model).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_a_checkpoint_of_an_earlier_version_is_read(checkpoint: Path, tmp_path: Path) -> None:
    """Its settings hold one that is gone, and lack one that has come."""
    settings = config_to(read_config("tiny"))
    settings["model"]["segments_at_once"] = 2
    del settings["model"]["stages_recomputed"]
    save_file(load_file(checkpoint), tmp_path / "old.safetensors", {"config": json.dumps(settings)})
    assert load_checkpoint(tmp_path / "old.safetensors").config == read_config("tiny")


def test_wrong_checkpoints_say_so(checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(checkpoint)
    save_file(weights, tmp_path / "bare.safetensors")
    (tmp_path / "text.safetensors").write_text("not weights")
    for name in ("bare", "text"):
        with pytest.raises(AvtrainError, match=rf"{name}\.safetensors: not a checkpoint of avtrain"):
            load_checkpoint(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.safetensors")


def test_params_prints_the_published_figures() -> None:
    result = CliRunner().invoke(main, ["params"])
    assert result.exit_code == 0
    assert "3,843,840" in result.output and "97.0 %" in result.output and "43,778,080" in result.output


def test_params_options() -> None:
    def last_line(*arguments: str) -> str:
        return CliRunner().invoke(main, ["params", *arguments]).output.strip().splitlines()[-1]

    assert " 85,054,464 parameters, 0.0 %" in last_line("--fusion", "late", "--share", "none")
    assert " 42,527,232 parameters" in last_line("--share", "transformers")
    assert "--rank: goes with --share lowrank" in last_line("--share", "both", "--rank", "8")


@pytest.mark.seconds
@pytest.mark.slow
def test_export_equals_eager(checkpoint: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["export", str(checkpoint), "-o", str(tmp_path / "model.pt2")])
    assert result.exit_code == 0, result.output
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.manual_seed(3)
    visual, audio = torch.randn(3, 15, 3, 8, 32, 32), torch.randn(3, 15, 1, 80, 128)
    with torch.no_grad():
        expected, actual = load_checkpoint(checkpoint).model(visual, audio)._asdict(), program(visual, audio)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("command", ["export", "import-released"])
def test_bad_files_are_one_line(command: str, tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("nothing of the kind")
    for name in ("bad", "none"):
        result = CliRunner().invoke(main, [command, str(tmp_path / name), "-o", str(tmp_path / "out.pt2")])
        assert result.exit_code == 1 and len(result.output.splitlines()) == 1 and name in result.output
    assert not (tmp_path / "out.pt2").exists()


def test_help_does_without_torch() -> None:
    code = "import sys, avtrain.cli, avtrain; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
