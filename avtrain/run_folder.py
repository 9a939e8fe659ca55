"""What runs leave on disk, and the one rule of going on. `metrics.jsonl` and checkpoints are read and written here.

The same command again goes on with what is in its folder; with other settings it is refused; `--force` begins anew.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from avtrain.errors import AvtrainError
from avtrain.files import written_whole
from avtrain.saved_state import Damaged, NotSaved, due_of, has_all, read_state, write_checkpoint

METRICS = "metrics.jsonl"
CONFIG = "config.json"  # of pretraining: all its settings
_WANDB_ID = "wandb_id.txt"
_MOST_NAMED = 4  # differences that an error shows
_LONGEST_SHOWN = 60  # characters of a value

Line = dict[str, Any]
_LOG = logging.getLogger(__name__)


class RunFolder:
    """The folder of a training run: `metrics.jsonl`, `checkpoints/step-NNNNNN/`, `tensorboard/`, and what Weights &
    Biases keeps."""

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

    def due(self) -> Line | None:
        """The line of metrics of the newest whole checkpoint that still lacks its evaluation; None if none does."""
        checkpoint = self.last_checkpoint()
        line = due_of(checkpoint) if checkpoint else None
        return None if line is None or any(one["step"] == self.last_step() for one in self.lines()) else line

    def save(self, step: int, state: Mapping[str, Any], save_weights: Callable[[Path], None], keep: int,
             due: Line | None = None) -> Path:
        """Write a checkpoint, whole or not at all, and delete the oldest ones.

        Args:
            step: of the run.
            state: what `load` gives back.
            save_weights: writes what others use of the checkpoint into its folder.
            keep: so many checkpoints stay.
            due: what `due` gives back until a line of this step is logged.

        Raises:
            NotSaved: it could not be written; the part that was is deleted.
        """
        folder = self._checkpoints / f"step-{step:06d}"
        part = _with(folder, ".part")
        self._delete_parts()
        try:
            write_checkpoint(part, state, save_weights, due)
            if folder.exists():
                _delete_checkpoint(folder, ".old.part")
            part.rename(folder)
        except NotSaved:
            shutil.rmtree(part, ignore_errors=True)
            raise
        for old in self._whole_checkpoints()[:-keep]:
            _delete_checkpoint(old)
        return folder

    def load(self, set_aside: bool = True) -> dict[str, Any] | None:
        """The state of the newest checkpoint that can be read, on the CPU; None if there is none.

        Args:
            set_aside: rename newer ones, which are damaged, and say so: of several processes, one does.

        Raises:
            AvtrainError: all that there are, are damaged.
        """
        damaged: list[tuple[Path, Damaged]] = []
        for folder in reversed(self._found_checkpoints()):
            try:
                state = read_state(folder)
            except Damaged as error:
                damaged.append((folder, error))
                continue
            for one, reason in damaged if set_aside else ():
                aside = _with(one, ".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                one.rename(aside)
                _LOG.warning("%s is damaged (%s): set aside, the run goes on from %s", one, reason, folder.name)
            return state
        if damaged:
            raise AvtrainError(f"{damaged[0][0]} is damaged ({damaged[0][1]}), and there is no whole checkpoint before "
                               "it: --force begins anew")
        return None

    def wandb_id(self) -> str:
        """Under which the run is known to Weights & Biases, made up the first time."""
        path = self.path / _WANDB_ID
        if not path.is_file():
            with written_whole(path) as temporary:
                temporary.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()

    def begin(self) -> None:
        """Delete what a run leaves that was stopped before its first whole checkpoint."""
        self._delete_parts()
        delete([self._metrics])

    def clear(self) -> None:
        """Delete all that a run wrote, and nothing else."""
        for folder in self._found_checkpoints():
            _delete_checkpoint(folder)
        for folder in self._checkpoints.glob("step-*.damaged"):
            shutil.rmtree(folder)
        self.begin()
        delete([*self.tensorboard.glob("events.out.tfevents.*"), self.path / _WANDB_ID])
        shutil.rmtree(self.path / "wandb", ignore_errors=True)
        for emptied in (self._checkpoints, self.tensorboard):
            if emptied.is_dir() and not any(emptied.iterdir()):
                emptied.rmdir()

    def _delete_parts(self) -> None:
        for part in self._checkpoints.glob("step-*.part"):
            shutil.rmtree(part, ignore_errors=True)  # what stays, as files in use do on NFS, is tried again

    def _text(self) -> str:
        return self._metrics.read_text(encoding="utf-8", errors="replace") if self._metrics.is_file() else ""

    def _found_checkpoints(self) -> list[Path]:
        """All under their final names, the oldest first."""
        return sorted((path for path in self._checkpoints.glob("step-*") if re.fullmatch(r"step-\d+", path.name)),
                      key=_step_of)

    def _whole_checkpoints(self) -> list[Path]:
        """Those whose files are all there, in full length; what they hold is only looked at when one is read."""
        return [path for path in self._found_checkpoints() if has_all(path)]


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


def _with(checkpoint: Path, ending: str) -> Path:
    return checkpoint.with_name(checkpoint.name + ending)


def _delete_checkpoint(folder: Path, ending: str = ".part") -> None:
    """Under another name first: one that is half deleted is never taken for a whole one."""
    part = _with(folder, ending)
    folder.rename(part)
    shutil.rmtree(part, ignore_errors=True)
