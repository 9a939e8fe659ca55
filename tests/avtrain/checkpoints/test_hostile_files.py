"""Checkpoints and settings of strangers: refused in a line, before memory is taken for what they claim."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from avtrain.checkpoints.authors import load_released, load_released_heads
from avtrain.checkpoints.ours import load_checkpoint, save_model
from avtrain.cli import main
from avtrain.config import config_to, read_config
from avtrain.errors import AvtrainError
from avtrain.models.avbert import AVBert


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors of a small checkpoint."""
    path = tmp_path_factory.mktemp("checkpoint") / "a.safetensors"
    config = read_config("tiny")
    save_model(path, AVBert(config.model), config)
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:8 + size]), content[8 + size:]


def _write(path: Path, header: dict[str, Any], tensors: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)
    return path


def _refused(path: Path, message: str) -> None:
    with pytest.raises(AvtrainError, match=message) as caught:
        load_checkpoint(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("section", "name", "value"), [
    ("model", "dimension", 10**12), ("model", "layers", 10**9), ("model", "visual_blocks", [10**9] * 4),
    ("model", "visual_blocks", [1] * 10**4), ("model", "max_segments", 10**12), ("model", "visual_width", 10**10),
    ("model", "rank", 10**12), ("model", "dimension", 1e999), ("model", "dropout", float("nan")),
    ("model", "feedforward", "64"), ("model", "heads", None), ("data", "crop", -1)])
def test_settings_that_no_memory_holds(parts: tuple[dict[str, Any], bytes], tmp_path: Path, section: str, name: str,
                                       value: object) -> None:
    header, tensors = parts
    config = config_to(read_config("tiny"))
    config[section][name] = value
    metadata = header["__metadata__"] | {"config": json.dumps(config)}
    _refused(_write(tmp_path / "a.safetensors", header | {"__metadata__": metadata}, tensors), f"{section}.{name}")


@pytest.mark.parametrize(("layers", "dimension"), [(20, 64), (2, 60_000)])
def test_a_large_model_of_small_tensors_is_refused_before_it_is_made(
        parts: tuple[dict[str, Any], bytes], tmp_path: Path, layers: int, dimension: int) -> None:
    """40 GB and more, if it were made."""
    header, tensors = parts
    config = config_to(read_config("tiny"))
    config["model"] |= {"layers": layers, "dimension": dimension, "heads": 1, "share_layers": False, "rank": None,
                        "feedforward": 60_000}
    metadata = header["__metadata__"] | {"config": json.dumps(config)}
    _refused(_write(tmp_path / "a.safetensors", header | {"__metadata__": metadata}, tensors), "is missing|, not ")


@pytest.mark.parametrize("parts_named", ["5", "[[1]]", '["all"]', '{"visual": 1}', '"visual"', "[" * 100_000])
def test_parts_that_are_none(parts: tuple[dict[str, Any], bytes], tmp_path: Path, parts_named: str) -> None:
    header, tensors = parts
    metadata = header["__metadata__"] | {"parts": parts_named}
    _refused(_write(tmp_path / "a.safetensors", header | {"__metadata__": metadata}, tensors), "damaged")


@pytest.mark.parametrize("change", [
    {"shape": [10**9, 10**9]}, {"shape": [-1]}, {"data_offsets": [0, 10**15]}, {"data_offsets": [10, 0]},
    {"dtype": "Q9"}, {"shape": []}])
def test_tensors_that_are_not_there(parts: tuple[dict[str, Any], bytes], tmp_path: Path,
                                    change: dict[str, Any]) -> None:
    header, tensors = parts
    name = next(name for name in header if name != "__metadata__" and len(header[name]["shape"]) > 1)
    _refused(_write(tmp_path / "a.safetensors", header | {name: header[name] | change}, tensors), "a.safetensors: ")


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, struct.pack("<Q", 1 << 60), struct.pack("<Q", 2) + b"{}",
                                     struct.pack("<Q", 100_000) + b"[" * 100_000])
def test_a_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    _refused(tmp_path / "a.safetensors", "not a checkpoint of avtrain")


@pytest.mark.parametrize("tensor", [torch.zeros(1).expand(10**6, 10**6), torch.zeros(3, device="meta"),
                                    torch.zeros(3, 3).to_sparse()], ids=["expanded", "meta", "sparse"])
def test_a_tensor_of_the_authors_that_is_not_stored(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"state_dict": {"concat_head.projection.weight": tensor}}, tmp_path / "a.pyth")
    for load in (load_released, load_released_heads):
        with pytest.raises(AvtrainError, match="a.pyth: tensors are not stored in whole: concat_head"):
            load(tmp_path / "a.pyth")


@pytest.mark.parametrize("content", [
    b"a = " + b"[" * 100_000, b"a = " + b"9" * 5000, b"\xff\xfe", b"[model]\n[model]\n",
    b"[model]\nlayers = 1\nlayers = 2\n",
    b"\0", b"a" * 1_000_000, b"model = 5", b"[model]\nlayers = 1e9", b"[model]\nlayers = 999999999999",
    b"[model]\ndropout = nan", b"[model]\nvisual = [1]", b"[objectives]\nkeep_percent = inf"])
def test_a_preset_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.toml").write_bytes(content)
    done = CliRunner().invoke(main, ["params", "--preset", str(tmp_path / "a.toml")])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.exception
    assert done.output.startswith("Error: ") and "a.toml" in done.output and len(done.output.splitlines()) == 1


@pytest.mark.parametrize("override", ["model.layers=" + "[" * 100_000, "model.layers=" + "9" * 5000,
                                      "model.layers=true", "=", ".=", "model.__class__=1"])
def test_an_override_that_is_none(override: str) -> None:
    with pytest.raises(AvtrainError):
        read_config("tiny", [override])
