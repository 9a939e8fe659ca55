"""The `avtrain` command: parses, calls, prints. Heavy imports stay inside the commands."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from avtrain import __version__
from avtrain.errors import AvtrainError, Stopped, TaskFailed
from avtrain.options import (
    FILE,
    FOLDER,
    Commands,
    Number,
    check_alone,
    check_ending,
    going_on_options,
    is_first,
    runtime_options,
    say,
    say_past_bars,
    set_option,
    store_options,
    wandb_option,
)

if TYPE_CHECKING:
    from avtrain.config import Config
    from avtrain.transfer.evaluate import Trial
    from avtrain.transfer.start import Start

_CONTEXT = {"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "AVTRAIN", "show_default": True}
# --share: layers of a Transformer share, Transformers share, low rank
_SHARING = {
    "none": (False, False, False),
    "layers": (True, False, False),
    "transformers": (False, True, False),
    "both": (True, True, False),
    "lowrank": (True, True, True),
}
_DEFAULT_RANK = 128


@click.group(cls=Commands, context_settings=_CONTEXT)
@click.version_option(__version__)
def main() -> None:
    """The parameter-efficient audio-visual Transformer: pretraining from shards, and transfer.

    Every option can also be set as AVTRAIN_COMMAND_OPTION, for example AVTRAIN_PARAMS_PRESET=tiny.
    """
    # OpenMP's threads would spin while they wait for each other, on the cores that the loader's workers need. Read when
    # torch is first imported; a step of the tiny preset on two cores then takes 0.8 of the time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    context = click.get_current_context()
    context.obj = time.monotonic()  # the start, for --max-time: what takes time is loaded later
    say_past_bars()
    check_alone(context.invoked_subcommand)


@main.command()
@click.option("--preset", default="paper", help="tiny, small, sound, paper, or a .toml file.")
@click.option("--fusion", type=click.Choice(["early", "mid", "late"]), help="Instead of the preset's.")
@click.option("--share", type=click.Choice(list(_SHARING)),
              help="Instead of the preset's: weights across layers, Transformers, both, or both with low rank.")
@click.option("--rank", type=click.IntRange(2), help="Of the factored layers, instead of the preset's.")
@set_option("params", "Any setting; may be repeated.")
def params(preset: str, fusion: str | None, share: str | None, rank: int | None, overrides: tuple[str, ...]) -> None:
    """Count parameters by part, and what sharing saves."""
    from avtrain.config import read_config
    from avtrain.parameters import counted, unshared

    config = read_config(preset, [*overrides, *_shortcuts(read_config(preset, overrides), fusion, share, rank)])
    counts = counted(config)
    whole, not_shared = sum(counts.values()), counted(unshared(config))["Transformers"]
    width = max(len(part) for part in counts)
    for part, count in [*counts.items(), ("whole", whole)]:
        click.echo(f"{part:<{width}}  {count:>12,}  {100 * count / whole:5.1f} %")
    shared = counts["Transformers"]
    click.echo(f"\nTransformers: {shared:,} parameters, {100 * (1 - shared / not_shared):.1f} % fewer than the "
               f"{not_shared:,} of the unshared model ({config.model.fusion} fusion)")


def _shortcuts(config: Config, fusion: str | None, share: str | None, rank: int | None) -> list[str]:
    """--fusion, --share and --rank as overrides."""
    overrides = [f"model.fusion={fusion}"] if fusion else []
    lowrank = config.model.rank is not None
    if share:
        layers, transformers, lowrank = _SHARING[share]
        overrides += [f"model.share_layers={str(layers).lower()}",
                      f"model.share_transformers={str(transformers).lower()}",
                      f"model.rank={config.model.rank or _DEFAULT_RANK}" if lowrank else "model.rank=none"]
    if rank is not None:
        if not lowrank:
            raise AvtrainError("--rank: goes with --share lowrank only")
        overrides.append(f"model.rank={rank}")
    return overrides


@main.command()
@click.option("--shards", multiple=True, default=["shards/demo"],
              help="Folder of a dataset or a split, or its address (s3://, https:// ...); may be repeated.")
@click.option("--test-shards", multiple=True,
              help="Held-out folders.  [default: SHARDS/test or SHARDS/val where it is]")
@click.option("--preset", default="tiny", help="tiny, small, sound, paper, or a .toml file.")
@set_option("pretrain", "Any setting; may be repeated.")
@click.option("--out", type=FOLDER, default=Path("runs/pretrain"),
              help="Folder of the run: checkpoints, metrics.jsonl, TensorBoard events.")
@going_on_options
@click.option("--max-steps", type=click.IntRange(1), help="Stop after this step, with a checkpoint.")
@click.option("--max-time", type=Number(0.01),
              help="Be done so many minutes after the start, evaluation and checkpoint included.")
@click.option("--new-data", is_flag=True, help="Go on with other shards than before: an epoch begins on them.")
@wandb_option
@store_options
@runtime_options("float64")
@click.pass_obj
def pretrain(started: float, shards: tuple[str, ...], test_shards: tuple[str, ...], preset: str,
             overrides: tuple[str, ...], out: Path, force: bool, max_steps: int | None, max_time: float | None,
             new_data: bool, wandb: str | None, device: str | None, precision: str) -> None:
    """Pretrain a model from scratch on shards. Run again, a run that was stopped goes on to the same losses."""
    from avtrain import ranks
    from avtrain.config import read_config
    from avtrain.data.storage import splits_in
    from avtrain.pretraining.pretrain import pretrain as run_pretraining
    from avtrain.pretraining.report import PAGE, held_out_text, is_current, write_report
    from avtrain.run_folder import RunFolder
    from avtrain.runtime import choose_runtime

    config = read_config(preset, overrides)
    if config.data.order == "stream":
        say("data.order=stream: shuffled within each worker; other data.workers or processes give another order")
    found = [splits_in(location) for location in shards]
    train, test = [one for one, _ in found], list(test_shards) or [held_out for _, held_out in found if held_out]
    runtime = choose_runtime(device, precision)
    try:
        ranks.begin(runtime.device)
        run = run_pretraining(config, train, test, out, runtime, force, max_steps,
                              started + 60 * max_time if max_time else None, new_data, wandb)
    except Stopped as stopped:
        say(str(stopped))  # first: who says stop may not wait for the report
        if is_first() and RunFolder(out).lines():
            write_report(out)
        raise click.exceptions.Exit(stopped.exit_code) from None
    ranks.end()
    if not is_first():
        return
    if run.folder.last_checkpoint() is None:
        raise AvtrainError(f"--max-time {max_time}: there was no time for a step, an evaluation and a checkpoint")
    if run.was_there:
        click.echo(f"{out} is at step {run.step} already: nothing is left to do (--force begins anew)")
    page = out / PAGE
    if run.made or not is_current(out):
        write_report(out)
    click.echo(f"step {run.step} of {config.training.steps}: {run.folder.last_checkpoint()}/model.safetensors, "
               f"{out}/metrics.jsonl, {page}")
    if run.bad_steps:
        click.echo(f"the losses of the last {run.bad_steps} steps were not finite; the checkpoint has the weights from "
                   "before them")
    for line in held_out_text(run.folder.last_figures()):
        click.echo(line)


@main.command("eval")
@click.option("--task", required=True, help="ucf101, esc50, esc10, kinetics-sounds, charades, audioset, demo, folder, "
                                           "or all: those whose shards are there.")
@click.option("--checkpoint", type=FILE, help="Of ours (.safetensors) or of the authors' release (.pyth).  "
              "[default: the last one of the newest run under runs/]")
@click.option("--init", type=click.Choice(["random"]), help="Instead of a checkpoint: a network at its random start.")
@click.option("--preset", help="Network of --init random: tiny, small, sound, paper, or a .toml.  [default: paper]")
@click.option("--protocol", type=click.Choice(["finetune", "linear", "knn"]),
              help="[default: the published one of the task]")
@click.option("--recipe", type=click.Choice(["published", "small"]), default="published",
              help="Settings of the protocol: the published ones, or ones for small networks on a CPU.")
@click.option("--split", default="all", help="Number of a split or fold, or all.")
@click.option("--modality", type=click.Choice(["visual", "audio", "both"]), help="[default: the task's]")
@click.option("--shards", default="shards", help="Folder that holds the datasets' shards, or its address (s3:// ...).")
@click.option("--validation", type=Number(0, 0.9), default=0.0,
              help="Share of the training clips, by group, that is only looked at. Nothing is chosen by it.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0)
@set_option("eval", "transfer.*, data.*, and with --init random model.*; may be repeated.")
@click.option("--out", type=FOLDER,
              help="Folder of the results.  [default: runs/eval/TASK-PROTOCOL-MODALITY-START[-splitN]]")
@click.option("--cache", type=FOLDER, default=Path("runs/features"), help="Folder of frozen features.")
@going_on_options
@wandb_option
@store_options
@runtime_options("float64")
def evaluate(task: str, checkpoint: Path | None, init: str | None, preset: str | None, protocol: str | None,
             recipe: str, split: str, modality: str | None, shards: str, validation: float, seed: int,
             overrides: tuple[str, ...], out: Path | None, cache: Path, force: bool, wandb: str | None,
             device: str | None, precision: str) -> None:
    """Transfer a checkpoint to a task: train on its training split, test on its test split.

    Run again, it goes on with what is in OUT, and does nothing again that is done.
    """
    from avtrain import ranks
    from avtrain.config import ModelConfig, ViewConfig, check_overrides
    from avtrain.runtime import choose_runtime
    from avtrain.transfer.evaluate import Trial, evaluate_task
    from avtrain.transfer.protocols import protocol_for
    from avtrain.transfer.results import results_text
    from avtrain.transfer.splits import present_tasks, splits_of
    from avtrain.transfer.start import load_source, newest_checkpoint, random_source
    from avtrain.transfer.tasks import TASKS

    if task != "all" and task not in TASKS:
        raise AvtrainError(f"--task {task}: known are {', '.join(TASKS)}, and all")
    if checkpoint and init:
        raise AvtrainError("--init random: goes without --checkpoint; say one of the two")
    if not init and preset:
        raise AvtrainError(f"--preset {preset}: goes with --init random; a checkpoint brings its own network")
    if not init and not checkpoint:
        checkpoint = newest_checkpoint(Path("runs"))
        say(f"--checkpoint {checkpoint}: the last one of the newest run under runs/")
    check_overrides(overrides, {"transfer": None, "data": ViewConfig} | ({} if checkpoint else {"model": ModelConfig}))
    of_protocol = [override for override in overrides if override.startswith("transfer.")]
    of_source = [override for override in overrides if not override.startswith("transfer.")]
    network = preset or "paper"
    source = load_source(checkpoint, of_source) if checkpoint else random_source(network, of_source, seed)
    runtime = choose_runtime(device, precision)

    complete = present_tasks(shards) if task == "all" else {task: []}
    trials = []  # of all, before the first is begun: a wrong option is one for every task
    for name in complete:
        chosen = protocol or TASKS[name].protocol
        trials.append(Trial(name, protocol_for(name, chosen, recipe, of_protocol), modality or TASKS[name].modality,
                            validation, seed))
    if wandb is not None and not any(trial.protocol.name == "finetune" for trial in trials):
        raise AvtrainError(f"--wandb {wandb}: goes with --protocol finetune; {trials[0].protocol.name} logs nothing")
    ranks.begin(runtime.device)

    def transferred(trial: Trial, splits: list[str]) -> dict[str, Any]:
        """Transfer to one task, and print what came out."""
        start = source.sha256[:8] or f"random-{Path(network).stem}"
        name = f"{trial.task}-{trial.protocol.name}-{trial.modality}-{start}"
        folder = Path("runs/eval", name if split == "all" else f"{name}-split{split}")
        if out:
            folder = out / trial.task if task == "all" else out
        results, before = evaluate_task(source, trial, splits, shards, folder, cache, runtime, force, wandb)
        if before:
            say(f"{folder} is finished already: nothing is left to do (--force begins anew)")
        say(f"{results_text(results)}\n  {folder}/results.json (95 % bootstrap intervals over videos)")
        return results

    if task != "all":
        transferred(trials[0], splits_of(task, split, shards))
        ranks.end()
        return
    wanted = [(trial, splits) for trial in trials
              if (splits := [one for one in complete[trial.task] if split in ("all", one)])]
    if not wanted:
        raise AvtrainError(f"--task all --split {split}: no task has all shards of a split in {shards}")
    _evaluate_all(transferred, wanted)
    ranks.end()


def _evaluate_all(transferred: Callable[[Trial, list[str]], dict[str, Any]],
                  wanted: list[tuple[Trial, list[str]]]) -> None:
    """One task after the other, and a table; one that fails does not stop the others."""
    from avtrain.transfer.results import table_text

    rows, failed = [], []
    for trial, splits in wanted:
        try:
            rows.append(transferred(trial, splits))
        except TaskFailed as error:
            failed.append(error)
        except AvtrainError as error:
            failed.append(TaskFailed(trial.task, str(error)))
    if rows:
        say(table_text(rows))
    if failed:
        raise AvtrainError("\n  ".join([f"{len(failed)} of {len(wanted)} tasks could not be evaluated:",
                                        *map(str, failed)]))


@main.command()
@click.option("--checkpoint", type=FILE, required=True, help="Of ours (.safetensors) or of the authors' (.pyth).")
@click.option("--shards", multiple=True, required=True, help="Folder of a split, or its address; may be repeated.")
@click.option("-o", "--output", type=FILE, required=True, help="The .parquet file to write.")
@set_option("embed", "May be repeated.", "data.FIELD=VALUE")
@click.option("--cache", type=FOLDER, hidden=True, expose_value=False)  # of earlier versions: nothing is kept beside
@store_options
@runtime_options()
def embed(checkpoint: Path, shards: tuple[str, ...], output: Path, overrides: tuple[str, ...], device: str | None,
          precision: str) -> None:
    """Write embeddings of clips: one row a clip and segment (key, labels, time_s, visual, audio, multimodal).

    Of each clip the first data.segments segments, as many as the checkpoint was trained with; --set data.segments=15
    takes more. The file appears when it is whole: a run that was stopped begins again.
    """
    from avtrain import ranks
    from avtrain.data.shards import open_folders
    from avtrain.files import remove_leftovers
    from avtrain.runtime import choose_runtime
    from avtrain.transfer.embeddings import write_embeddings

    check_ending(output, ".parquet")
    source = _embedder(checkpoint, overrides)
    folder, runtime = open_folders(list(shards)), choose_runtime(device, precision)
    ranks.begin(runtime.device)
    if ranks.by_first(lambda: remove_leftovers(output)):
        say(f"{output}: what a killed run had left of it is removed, and it is begun again")
    rows = write_embeddings(source.model, folder, source.data, runtime, output)
    ranks.end()
    say(f"{rows} rows in {output}")


def _embedder(checkpoint: Path, overrides: tuple[str, ...]) -> Start:
    """A whole network, to take embeddings from."""
    from avtrain.config import ClipConfig, check_overrides
    from avtrain.transfer.start import load_source

    check_overrides(overrides, {"data": ClipConfig})
    source = load_source(checkpoint, overrides)
    source.check_parts(source.data.modality, True)
    return source


@main.command()
@click.option("--checkpoint", type=FILE, required=True, help="Of ours (.safetensors) or of the authors' (.pyth).")
@click.option("--shards", default="shards/demo",
              help="Folder of a dataset, or its address (s3:// ...): common directions are learned on train, without "
              "labels, tried on test.")
@click.option("-o", "--output", type=FILE, default=Path("runs/retrieval.png"), help="The picture to draw.")
@set_option("retrieve", "May be repeated.", "data.FIELD=VALUE")
@click.option("--cache", type=FOLDER, default=Path("runs/features"), help="Folder of frozen features.")
@store_options
@runtime_options()
def retrieve(checkpoint: Path, shards: str, output: Path, overrides: tuple[str, ...], cache: Path,
             device: str | None, precision: str) -> None:
    """Find the pictures that go with a sound, and the sounds that go with a picture."""
    from avtrain.data.shards import open_folders
    from avtrain.data.storage import below, has_index, shown
    from avtrain.runtime import choose_runtime
    from avtrain.transfer.retrieval import draw_retrieval
    from avtrain.transfer.retrieval import retrieve as search

    check_ending(output, ".png")
    folders = {split: below(shards, split) for split in ("train", "test")}
    for split, folder in folders.items():
        if not has_index(folder):
            raise AvtrainError(f"--shards {shown(shards)}: no {split}/index.json in it; the folder of a dataset with a "
                               "train and a test split is wanted, such as shards/demo")
    source = _embedder(checkpoint, overrides)
    source.check_parts("both", True)
    train, test = (open_folders([folder]) for folder in folders.values())
    found = search(source.model, train, test, source.data, choose_runtime(device, precision), cache)
    for name, from_sound in (("sound to picture", True), ("picture to sound", False)):
        ks = [k for k in (1, 5, 10) if k < len(found.keys)]
        click.echo(f"{name}, {len(found.keys)} clips: " + ", ".join(
            f"recall@{k} {100 * found.recall(k, from_sound):.1f} % (chance {100 * k / len(found.keys):.1f} %)"
            for k in ks))
    draw_retrieval(found, test, source.data, output)
    click.echo(str(output))


@main.command()
@click.argument("run", type=FOLDER)
def report(run: Path) -> None:
    """Draw the curves of a RUN (a folder of `avtrain pretrain`) and put its figures on a page."""
    from avtrain.pretraining.report import write_report

    click.echo(", ".join(map(str, write_report(run))))


@main.command("import-released")
@click.argument("checkpoint", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The .safetensors file to write.")
def import_released(checkpoint: Path, output: Path) -> None:
    """Turn a CHECKPOINT of the authors' release (.pyth) into one of ours."""
    from avtrain.checkpoints.authors import load_released_parts
    from avtrain.checkpoints.ours import save_model
    from avtrain.config import Config

    model, parts = load_released_parts(checkpoint)
    save_model(output, model, Config(model=model.config), parts)
    click.echo(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters in {output}; "
               "task heads were left out")


@main.command()
@click.argument("checkpoint", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The .pt2 file to write.")
def export(checkpoint: Path, output: Path) -> None:
    """Write CHECKPOINT's model as a program for torch.export.load, checked against the model."""
    from avtrain.checkpoints.export import export_model

    difference = export_model(checkpoint, output)
    click.echo(f"{output}: outputs differ from the model's by at most {difference:.1e}")


if __name__ == "__main__":
    main()
