"""What runs leave on disk: cut lines, half checkpoints, other settings, and what --force deletes."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from avtrain.errors import AvtrainError
from avtrain.run_folder import (
    RunFolder,
    check_settings,
    newest_weights,
    read_settings,
    write_settings,
)
from avtrain.saved_state import NotSaved


def _save(folder, step, keep=3):
    return folder.save(step, {"step": step}, lambda to: (to / "model.safetensors").write_text(str(step)), keep)


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', "{", "\0\0\0", '{"step": 3', "3"])
def test_a_last_line_that_was_cut_off_is_not_there(tmp_path, rest):
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        folder.log({"step": step, "loss": 1 / 3, "test_loss": step})
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole + rest)
    assert folder.lines() == [{"step": step, "loss": 0.3333333333, "test_loss": step} for step in (1, 2)]
    assert folder.last_figures()["step"] == 2
    folder.drop_lines_after(2)
    assert (tmp_path / "metrics.jsonl").read_text() == whole
    folder.drop_lines_after(1)
    folder.log({"step": 2})
    assert [line["step"] for line in folder.lines()] == [1, 2]


def test_a_line_that_was_not_cut_off_is_kept_and_a_damaged_one_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.lines() == [] and folder.last_figures() == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert [line["step"] for line in folder.lines()] == [1, 2]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(AvtrainError, match=r"metrics.jsonl: line 2 is damaged"):
        folder.lines()


def test_only_whole_checkpoints_count_and_the_last_ones_are_kept(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.last_checkpoint() is None and folder.last_step() == 0 and folder.load() is None
    (tmp_path / "checkpoints/step-000001.part").mkdir(parents=True)
    (tmp_path / "checkpoints/step-000001.part/training.pt").write_text("half")
    assert folder.last_checkpoint() is None
    for step in (2, 9, 1_000_000):
        _save(folder, step, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000009", "step-1000000"]
    assert folder.last_step() == 1_000_000 and folder.load() == {"step": 1_000_000}


def _flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


@pytest.mark.parametrize("name", ["training.pt", "model.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-1], lambda content: b"nonsense",
                                    _flipped, None])
def test_in_place_of_a_damaged_checkpoint_the_one_before_is_taken(tmp_path, caplog, name, damage):
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        folder.save(step, {"weights": torch.full((100,), step)},
                    lambda to: (to / "model.safetensors").write_text("weights"), 3)
    path = folder.last_checkpoint() / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    if name == "checkpoint.json" and damage is None:  # of an earlier version: the rest is whole
        assert folder.load()["weights"][0] == 2 and not caplog.messages
        return
    if name == "checkpoint.json" and damage is _flipped:
        return  # may be a digit or a letter of a name
    assert folder.load()["weights"][0] == 1 and folder.last_step() == 1
    [said] = caplog.messages
    assert f"step-000002 is damaged ({name} is " in said and "the run goes on from step-000001" in said
    assert sorted(one.name for one in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000002.damaged"]
    _save(folder, 2)
    assert folder.load() == {"step": 2} and len(caplog.messages) == 1


def test_an_earlier_versions_damaged_checkpoint_is_found_out_where_torch_can(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        _save(folder, step)
        (folder.last_checkpoint() / "checkpoint.json").unlink()
    path = folder.last_checkpoint() / "training.pt"
    for content in (b"", path.read_bytes()[:100], b"nonsense"):
        path.write_bytes(content)
        assert folder.load() == {"step": 1}
        (tmp_path / "checkpoints/step-000002.damaged").rename(path.parent)


def test_with_no_whole_checkpoint_nothing_is_begun_anew_by_itself(tmp_path):
    folder = RunFolder(tmp_path)
    folder.log({"step": 1})
    (_save(folder, 1) / "training.pt").write_bytes(b"")
    assert folder.last_checkpoint() is None
    with pytest.raises(AvtrainError, match=r"step-000001 is damaged \(.*\), and there is no whole checkpoint before"):
        folder.load()
    assert folder.lines() and (tmp_path / "checkpoints/step-000001/training.pt").exists()


def test_a_line_is_due_until_it_is_logged(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.due() is None
    folder.save(3, {}, lambda to: None, 3, {"step": 3, "loss": 1 / 3})
    assert folder.due() == {"step": 3, "loss": 1 / 3}
    folder.log({"step": 3, "loss": 1 / 3, "test_loss": 1})
    assert folder.due() is None


def test_a_full_disk_is_found_out_before_and_while_it_is_written_to(tmp_path, monkeypatch):
    folder, state = RunFolder(tmp_path), {"weights": torch.zeros(2**18)}
    _save(folder, 1)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**19))
        with pytest.raises(NotSaved, match=r"No space left on device; it needs 1.0 MiB, and 0.5 MiB are free"):
            folder.save(2, state, lambda to: None, 3)

    def full(to):
        raise OSError(errno.EDQUOT, "Disk quota exceeded", "model")

    def full_too(to):
        raise SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)")

    for save_weights in (full, full_too):
        with pytest.raises(NotSaved, match="Disk quota exceeded"):
            folder.save(2, state, save_weights, 3)
    if Path("/dev/full").is_char_device():
        with pytest.raises(NotSaved, match="No space left on device"):
            folder.save(2, state, lambda to: (to / "training.pt").symlink_to("/dev/full"), 3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]

    def fault(to):
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):  # not taken for a full disk
        folder.save(2, state, fault, 3)


def test_clearing_deletes_what_a_run_wrote_and_nothing_else(tmp_path):
    folder = RunFolder(tmp_path)
    _save(folder, 1)
    folder.log({"step": 1})
    for ending in (".part", ".damaged"):
        (tmp_path / f"checkpoints/step-000002{ending}").mkdir()
    folder.tensorboard.mkdir()
    (folder.tensorboard / "events.out.tfevents.1.host").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "checkpoints/best").mkdir()
    folder.clear()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "checkpoints", "checkpoints/best", "notes.txt"]


def test_what_differs_is_said_in_one_line(tmp_path):
    before = {"precision": "float32", "data": {"scale": [1, 2], "noise": []}, "seed": 0}
    write_settings(tmp_path / "settings.json", before)
    read = read_settings(tmp_path / "settings.json")
    check_settings(tmp_path, read, {"precision": "float32", "data": {"scale": (1, 2), "noise": ()}, "seed": 0})
    with pytest.raises(AvtrainError) as found:
        check_settings(tmp_path, read, {"precision": "bfloat16", "data": {"scale": (1, 3), "noise": ()}, "seed": 0,
                                        "new": True})
    assert str(found.value) == (
        f'{tmp_path} was begun with other settings: precision was "float32" and is "bfloat16", data.scale was [1, 2] '
        "and is [1, 3], new was null and is true; use the same again, --force to begin anew, or another folder with "
        "--out")
    with pytest.raises(AvtrainError, match=r"i4 was .*, and 2 more; use"):
        check_settings(tmp_path, {}, {f"i{number}": number for number in range(1, 7)})
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(AvtrainError, match=r"settings.json is damaged: --force begins anew"):
        read_settings(tmp_path / "settings.json")


def test_the_newest_weights_are_of_pretraining_and_whole(tmp_path):
    assert newest_weights(tmp_path / "nowhere") is None
    for number, name in enumerate(("deep/run", "newer", "eval/ucf101/split-1", "stopped")):
        folder = RunFolder(tmp_path / name)
        if name != "stopped":
            for step in (1, 2):
                path = _save(folder, step) / "model.safetensors"
            os.utime(path, (number, number))
        if "eval" not in name:
            folder.path.mkdir(exist_ok=True)
            (folder.path / "config.json").write_text(json.dumps({}))
    assert newest_weights(tmp_path) == tmp_path / "newer/checkpoints/step-000002/model.safetensors"
    assert torch.load(tmp_path / "newer/checkpoints/step-000002/training.pt", weights_only=True) == {"step": 2}
