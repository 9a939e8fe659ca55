"""What runs leave on disk, and the one rule of going on. `metrics.jsonl` and checkpoints are read and written here.

The same command again goes on with what is in its folder; with other settings it is refused; `--force` begins anew.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from avtrain.errors import AvtrainError
from avtrain.files import written_whole

METRICS = "metrics.jsonl"
CONFIG = "config.json"  # of pretraining: all its settings
_STATE = "training.pt"
_MOST_NAMED = 4  # differences that an error shows
_LONGEST_SHOWN = 60  # characters of a value

Line = dict[str, Any]


class RunFolder:
    """The folder of a training run: `metrics.jsonl`, `checkpoints/step-NNNNNN/`, `tensorboard/`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensorboard = path / "tensorboard"
        self._metrics, self._checkpoints = path / METRICS, path / "checkpoints"

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line to the metrics."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(_text_of({name: float(f"{value:.10g}") if isinstance(value, float) else value
                                 for name, value in line.items()}))

    def lines(self) -> list[Line]:
        """The lines of the metrics; a last one that was cut off, by a kill or while it is written, is not there.

        Raises:
            AvtrainError: another line is damaged.
        """
        *whole, rest = self._text().split("\n")
        found = []
        for number, text in enumerate([*whole, rest] if rest else whole, 1):
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if isinstance(line, dict) and "step" in line:
                found.append(line)
            elif text and number <= len(whole):
                raise AvtrainError(f"{self._metrics}: line {number} is damaged: delete that line")
        return found

    def last_figures(self) -> Line:
        """The last line of the metrics that holds an evaluation on held-out clips; {} if none does."""
        return next((line for line in reversed(self.lines()) if any(name.startswith("test_") for name in line)), {})

    def drop_lines_after(self, step: int) -> None:
        """Take back what a run logged after its last checkpoint."""
        if self._metrics.exists():
            kept = "".join(_text_of(line) for line in self.lines() if line["step"] <= step)
            if kept != self._text():
                with written_whole(self._metrics) as temporary:
                    temporary.write_text(kept, encoding="utf-8")

    def last_checkpoint(self) -> Path | None:
        """The folder of the newest whole checkpoint."""
        checkpoints = self._whole_checkpoints()
        return checkpoints[-1] if checkpoints else None

    def last_step(self) -> int:
        """That of the newest whole checkpoint; 0 if there is none."""
        checkpoint = self.last_checkpoint()
        return _step_of(checkpoint) if checkpoint else 0

    def save(self, step: int, state: Mapping[str, Any], save_weights: Callable[[Path], None], keep: int) -> Path:
        """Write a checkpoint, whole or not at all, and delete the oldest ones.

        Args:
            step: of the run.
            state: what `load` gives back.
            save_weights: writes what others use of the checkpoint into its folder.
            keep: so many checkpoints stay.
        """
        folder = self._checkpoints / f"step-{step:06d}"
        part = _part_of(folder)
        self._delete_parts()
        part.mkdir(parents=True)
        save_weights(part)
        with (part / _STATE).open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        for old in self._whole_checkpoints()[:-keep]:
            _delete_checkpoint(old)
        return folder

    def load(self) -> dict[str, Any] | None:
        """The state of the newest whole checkpoint, on the CPU; None if there is none.

        Raises:
            AvtrainError: it can't be read.
        """
        folder = self.last_checkpoint()
        if folder is None:
            return None
        try:
            state: dict[str, Any] = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise AvtrainError(f"{folder / _STATE} is damaged: delete {folder}, and the run goes on from the "
                               "checkpoint before it") from error
        return state

    def begin(self) -> None:
        """Delete what a run leaves that was stopped before its first whole checkpoint."""
        self._delete_parts()
        delete([self._metrics])

    def clear(self) -> None:
        """Delete all that a run wrote, and nothing else."""
        for folder in self._whole_checkpoints():
            _delete_checkpoint(folder)
        self.begin()
        delete(self.tensorboard.glob("events.out.tfevents.*"))
        for emptied in (self._checkpoints, self.tensorboard):
            if emptied.is_dir() and not any(emptied.iterdir()):
                emptied.rmdir()

    def _delete_parts(self) -> None:
        for part in self._checkpoints.glob("step-*.part"):
            shutil.rmtree(part)

    def _text(self) -> str:
        return self._metrics.read_text(encoding="utf-8", errors="replace") if self._metrics.is_file() else ""

    def _whole_checkpoints(self) -> list[Path]:
        return sorted((path for path in self._checkpoints.glob("step-*")
                       if path.suffix != ".part" and (path / _STATE).is_file()), key=_step_of)


def newest_weights(root: Path) -> Path | None:
    """The model's file of the last checkpoint of that pretraining run below `root` that was saved last."""
    runs = [RunFolder(path.parent) for path in root.rglob(CONFIG)]
    found = [checkpoint / "model.safetensors" for run in runs if (checkpoint := run.last_checkpoint())]
    return max((path for path in found if path.is_file()), key=lambda path: path.stat().st_mtime_ns, default=None)


def read_settings(path: Path, kind: type[Any] = dict, anew: str = "--force") -> Any:
    """What a run wrote down when it was begun; `anew` is what would begin it anew, for messages.

    Raises:
        AvtrainError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, kind):
        raise AvtrainError(f"{path} is damaged: {anew} begins anew, or choose another folder with --out")
    return content


def write_settings(path: Path, content: Any) -> None:
    """What `read_settings` gives back."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_settings(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], anew: str = "--force") -> None:
    """Raise where a run was begun with other settings.

    Args:
        folder: of the run.
        before: what it wrote down.
        now: what is asked for.
        anew: what would begin it anew, for the message.
    """
    found = list(_differences(_as_read(before), _as_read(now), ""))
    if found:
        more = f", and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        raise AvtrainError(f"{folder} was begun with other settings: {', '.join(found[:_MOST_NAMED])}{more}; use the "
                           f"same again, {anew} to begin anew, or another folder with --out")


def delete(paths: Iterable[Path]) -> None:
    """Delete these files, those that are there."""
    for path in paths:
        path.unlink(missing_ok=True)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> Iterable[str]:
    for name in {**now, **before}:
        one, other = before.get(name), now.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other, f"{prefix}{name}.")
        elif one != other:
            yield f"{prefix}{name} was {_shown(one)} and is {_shown(other)}"


def _as_read(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As a file of settings gives them back: tuples as lists."""
    read: dict[str, Any] = json.loads(json.dumps(settings))
    return read


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def _text_of(line: Mapping[str, Any]) -> str:
    return json.dumps(line) + "\n"


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _part_of(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".part")


def _delete_checkpoint(folder: Path) -> None:
    """Under another name first: one that is half deleted is never taken for a whole one."""
    part = _part_of(folder)
    folder.rename(part)
    shutil.rmtree(part)
