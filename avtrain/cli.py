"""The `avtrain` command: parses, calls, prints. Heavy imports stay inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from avtrain import __version__
from avtrain.errors import AvtrainError

if TYPE_CHECKING:
    from avtrain.config import Config

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
_FILE = click.Path(path_type=Path, dir_okay=False)


class _Commands(click.Group):
    """Turns what is meant for people into one line and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except AvtrainError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise click.ClickException(f"{error.filename or 'system'}: {error.strerror or error}") from error
        except KeyboardInterrupt:
            click.echo("\ninterrupted", err=True)
            raise click.exceptions.Exit(130) from None


@click.group(cls=_Commands, context_settings=_CONTEXT)
@click.version_option(__version__)
def main() -> None:
    """The parameter-efficient audio-visual Transformer: pretraining from shards, and transfer.

    Every option can also be set as AVTRAIN_COMMAND_OPTION, for example AVTRAIN_PARAMS_PRESET=tiny.
    """


@main.command()
@click.option("--preset", default="paper", help="tiny, small, paper, or a .toml file.")
@click.option("--fusion", type=click.Choice(["early", "mid", "late"]), help="Instead of the preset's.")
@click.option("--share", type=click.Choice(list(_SHARING)),
              help="Instead of the preset's: weights across layers, Transformers, both, or both with low rank.")
@click.option("--rank", type=click.IntRange(2), help="Of the factored layers, instead of the preset's.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.FIELD=VALUE", help="Any setting; may be repeated.")
def params(preset: str, fusion: str | None, share: str | None, rank: int | None, overrides: tuple[str, ...]) -> None:
    """Count parameters by part, and what sharing saves."""
    from avtrain.config import read_config

    config = read_config(preset, [*overrides, *_shortcuts(read_config(preset, overrides), fusion, share, rank)])
    counts = _count(config)
    whole, unshared = sum(counts.values()), _count(_unshared(config))["Transformers"]
    width = max(len(part) for part in counts)
    for part, count in [*counts.items(), ("whole", whole)]:
        click.echo(f"{part:<{width}}  {count:>12,}  {100 * count / whole:5.1f} %")
    shared = counts["Transformers"]
    click.echo(f"\nTransformers: {shared:,} parameters, {100 * (1 - shared / unshared):.1f} % fewer than the "
               f"{unshared:,} of the unshared model ({config.model.fusion} fusion)")


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


def _unshared(config: Config) -> Config:
    from dataclasses import replace

    return replace(config, model=replace(config.model, share_layers=False, share_transformers=False, rank=None))


def _count(config: Config) -> dict[str, int]:
    import torch

    from avtrain.models.avbert import AVBert

    with torch.device("meta"):  # shapes without memory
        model = AVBert(config.model)
    parts = {"visual_cnn": "visual CNN", "audio_cnn": "audio CNN", "visual_projection": "projections and norms",
             "visual_norm": "projections and norms", "audio_projection": "projections and norms",
             "audio_norm": "projections and norms", "encoder": "Transformers"}
    counts = dict.fromkeys([*parts.values(), "embeddings"], 0)
    for name, parameter in model.named_parameters():
        counts[parts.get(name.partition(".")[0], "embeddings")] += parameter.numel()
    return counts


@main.command()
@click.option("--shards", multiple=True, default=["shards/demo"],
              help="Folder of a dataset or a split, or its http(s) address; may be repeated.")
@click.option("--test-shards", multiple=True,
              help="Held-out folders.  [default: SHARDS/test or SHARDS/val where it is]")
@click.option("--preset", default="tiny", help="tiny, small, paper, or a .toml file.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.FIELD=VALUE", help="Any setting; may be repeated.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/pretrain"),
              help="Folder of the run: checkpoints, metrics.jsonl, TensorBoard events.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in OUT.")
@click.option("--max-steps", type=click.IntRange(1), help="Stop after this step, with a checkpoint.")
@click.option("--max-time", type=click.FloatRange(0.01), help="Stop after so many minutes, with a checkpoint.")
@click.option("--device", help="Such as cpu or cuda:0.  [default: a GPU if there is one]")
@click.option("--precision", type=click.Choice(["auto", "bfloat16", "float32"]), default="auto",
              help="auto: bfloat16 where the hardware has it.")
def pretrain(shards: tuple[str, ...], test_shards: tuple[str, ...], preset: str, overrides: tuple[str, ...], out: Path,
             resume: bool, max_steps: int | None, max_time: float | None, device: str | None, precision: str) -> None:
    """Pretrain a model from scratch on shards."""
    from avtrain.config import read_config
    from avtrain.pretrain import pretrain as run_pretraining
    from avtrain.report import write_report
    from avtrain.runtime import choose_runtime

    config = read_config(preset, overrides)
    train = [_split_of(location, "train") or location for location in shards]
    test = list(test_shards) or [there for location in shards
                                 if (there := _split_of(location, "test") or _split_of(location, "val"))]
    try:
        run = run_pretraining(config, train, test, out, choose_runtime(device, precision), resume, max_steps,
                              60 * max_time if max_time else None)
    except KeyboardInterrupt:
        if (out / "metrics.jsonl").is_file():
            write_report(out)
        raise
    page, _ = write_report(out)
    click.echo(f"step {run.position.step} of {config.training.steps}: {run.last_checkpoint()}/model.safetensors, "
               f"{out}/metrics.jsonl, {page}")
    _print_held_out(run.last_figures())


def _print_held_out(figures: dict[str, float]) -> None:
    """What the last evaluation found, beside chance."""
    if "test_pair_accuracy" in figures:
        click.echo(f"held-out pair accuracy {100 * figures['test_pair_accuracy']:.1f} % (chance 50 %)")
    prefix = "test_masked_top1_"
    for name, value in figures.items():
        if name.startswith(prefix):
            where = name.removeprefix(prefix).replace("_", " Transformer, ")
            click.echo(f"held-out masked top-1 of 100 candidates, {where}: {100 * value:.1f} % (chance 1 %)")


def _split_of(location: str, split: str) -> str | None:
    """The split's folder in the local folder of a dataset."""
    return str(Path(location) / split) if (Path(location) / split / "index.json").is_file() else None


@main.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
def report(run: Path) -> None:
    """Draw the curves of a RUN (a folder of `avtrain pretrain`) and put its figures on a page."""
    from avtrain.report import write_report

    click.echo(", ".join(map(str, write_report(run))))


@main.command("import-released")
@click.argument("checkpoint", type=_FILE)
@click.option("-o", "--output", type=_FILE, required=True, help="The .safetensors file to write.")
def import_released(checkpoint: Path, output: Path) -> None:
    """Turn a CHECKPOINT of the authors' release (.pyth) into one of ours."""
    from avtrain.checkpoint import save_model
    from avtrain.config import Config
    from avtrain.released import load_released

    model = load_released(checkpoint)
    save_model(output, model, Config(model=model.config))
    click.echo(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters in {output}; "
               "task heads were left out")


@main.command()
@click.argument("checkpoint", type=_FILE)
@click.option("-o", "--output", type=_FILE, required=True, help="The .pt2 file to write.")
def export(checkpoint: Path, output: Path) -> None:
    """Write CHECKPOINT's model as a program for torch.export.load, checked against the model."""
    from avtrain.checkpoint import export_model

    difference = export_model(checkpoint, output)
    click.echo(f"{output}: outputs differ from the model's by at most {difference:.1e}")


if __name__ == "__main__":
    main()
