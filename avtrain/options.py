"""What the commands of `avtrain` share: options, and how they end."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from avtrain.errors import AvtrainError, Elsewhere, Stopped

FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
_SHARED = ("pretrain", "eval", "embed")  # by the processes that torchrun or srun starts
_Command = TypeVar("_Command", bound=Callable[..., Any])


class Commands(click.Group):
    """Turns what is meant for people into one line and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except Elsewhere as error:
            if is_first():  # the one that has it says so, and the first one
                click.echo(f"Error: {error}", err=True)
            raise click.exceptions.Exit(1) from error
        except AvtrainError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise click.ClickException(f"{error.filename or 'system'}: {error.strerror or error}") from error
        except Stopped as stopped:
            say(str(stopped))
            raise click.exceptions.Exit(stopped.exit_code) from None
        except KeyboardInterrupt:
            click.echo("\ninterrupted", err=True)
            raise click.exceptions.Exit(130) from None


def is_first() -> bool:
    """Whether this is the first process of a run, or the only one."""
    from avtrain import ranks  # torch

    return ranks.started_with()[0] == 0


def say(text: str) -> None:
    """Print a line, once a run."""
    if is_first():
        click.echo(text)


def check_alone(command: str | None) -> None:
    """Raise AvtrainError where torchrun or srun has started several processes that would all do the same."""
    if command not in _SHARED and any(os.environ.get(name, "1") != "1" for name in ("WORLD_SIZE",
                                                                                   "SLURM_STEP_NUM_TASKS")):
        from avtrain import ranks  # torch

        if (count := ranks.started_with()[1]) > 1:
            raise AvtrainError(f"avtrain {command} runs in one process, and {count} were started: leave torchrun or "
                               "srun out")


def check_ending(output: Path, ending: str) -> None:
    """Raise AvtrainError where the name of a file has another ending."""
    if output.suffix != ending:
        raise AvtrainError(f"--output {output}: a name that ends in {ending} is wanted")


class _PastBars(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(record.getMessage(), file=sys.stderr)


def say_past_bars() -> None:
    """From now on write what this package logs to stderr, a line each, and leave progress bars whole."""
    log = logging.getLogger(__package__)
    if not any(isinstance(handler, _PastBars) for handler in log.handlers):
        log.addHandler(_PastBars())


class Number(click.FloatRange):
    """A number in a range. nan, which no bound keeps out, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no number.", param, ctx)
        return number


def set_option(command: str, help_text: str, metavar: str = "SECTION.FIELD=VALUE") -> Callable[[_Command], _Command]:
    """--set of a command; click would make AVTRAIN_COMMAND_OVERRIDES of the parameter's name."""
    return click.option("--set", "overrides", multiple=True, metavar=metavar, help=help_text,
                        envvar=f"AVTRAIN_{command.upper()}_SET")


def runtime_options(*more: str) -> Callable[[_Command], _Command]:
    """--device and --precision, which may be one of these more."""
    def added(command: _Command) -> _Command:
        precision = click.option("--precision", type=click.Choice(["auto", "bfloat16", "float16", "float32", *more]),
                                 default="auto", help="auto: bfloat16 where the hardware has it; float16 (in training "
                                 "with scaled losses) on GPUs that only emulate it, such as V100 and T4; else float32.")
        device = click.option("--device", help="Such as cpu or cuda:0.  [default: a GPU if there is one]")
        return device(precision(command))

    return added


def going_on_options(command: _Command) -> _Command:
    """--force; and --resume, which was wanted once and does nothing: a command that is run again goes on anyway."""
    resume = click.option("--resume", is_flag=True, hidden=True, expose_value=False)
    force = click.option("--force", is_flag=True, help="Begin anew: delete what an earlier run wrote to OUT (eval: of "
                         "the same splits). Without it the same command goes on with that.")
    return force(resume(command))


def wandb_option(command: _Command) -> _Command:
    """--wandb."""
    def installed(context: click.Context, parameter: click.Parameter, project: str | None) -> str | None:
        if project is not None and importlib.util.find_spec("wandb") is None:
            raise AvtrainError(f"--wandb {project} needs Weights & Biases: pip install 'avprep-avtrain[wandb]'")
        return project

    return click.option("--wandb", metavar="PROJECT", callback=installed, help="Log to this project on Weights & "
                        "Biases too (WANDB_MODE=offline: to the run's folder).")(command)


def store_options(command: _Command) -> _Command:
    """--cache-gb and --storage-options, which go into the environment: worker processes find them there, too."""
    def setting(name: str, *declaration: str, **rest: Any) -> Callable[[_Command], _Command]:
        def put(context: click.Context, parameter: click.Parameter, value: Any) -> None:
            if value is not None:
                os.environ[name] = str(value)

        return click.option(*declaration, envvar=name, callback=put, expose_value=False, **rest)

    cache = setting("AVTRAIN_CACHE_GB", "--cache-gb", type=Number(0, min_open=True),
                    show_default="what leaves a tenth of its disk free",
                    help="Size of the cache of shards from stores (its folder: AVTRAIN_CACHE).")
    storage = setting("AVTRAIN_STORAGE_OPTIONS", "--storage-options", metavar="JSON",
                      help="For the store, beside what its own environment variables say.")
    return cache(storage(command))
