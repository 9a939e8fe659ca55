"""What the READMEs show works: commands, options, targets, files, the reading example."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [block.splitlines() for block in re.findall(r"^```\w*\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)]
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block
            if re.match(r"(avprep|avtrain|make) ", line)]


def test_opens_with_two_make_commands():
    first = [line.split("#")[0].split() for line in BLOCKS[0]]
    assert len(first) == 2 and first[1] == ["make", "test"] and README.index("```") < 60


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make")])
def test_make_targets_exist(command):
    target = next(word for word in command.split()[1:] if "=" not in word)
    done = subprocess.run(["make", "--dry-run", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, target
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("av")])
def test_commands_and_their_options_exist(command):
    from avprep.cli import main as avprep_main
    from avtrain.cli import main as avtrain_main

    program, name, *rest = shlex.split(command)
    known = {"avprep": avprep_main, "avtrain": avtrain_main}[program].commands[name]
    options = {option for parameter in known.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in rest if word.startswith("-")} <= options


def test_demo_commands_run_as_written(avprep, tiny_demo, tmp_path):
    built = avprep("build", "--dataset", "demo", "--raw", tiny_demo, "--split", "all", cwd=tmp_path)
    assert built.returncode == 0
    run = [command for command in COMMANDS if command.startswith("avprep") and "shards/demo" in command]
    assert len(run) >= 3
    for command in run:
        done = avprep(*shlex.split(command)[1:], cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_reading_example_of_the_format_runs(avprep, tiny_demo, tmp_path, monkeypatch):
    built = avprep("build", "--dataset", "demo", "--raw", tiny_demo, cwd=tmp_path)
    assert built.returncode == 0
    text = (ROOT / "shards" / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert names["sample"]["logmel.npy"].shape == (80, 1920)


def test_every_dataset_and_every_linked_file_is_there():
    from avprep.datasets import DATASETS

    table = README[README.index("| `--dataset`"):README.index("A sample is")]
    first_column = "".join(row.split("|")[1] for row in table.splitlines() if "|" in row)
    assert set(re.findall(r"`([a-z0-9-]+)`", first_column)) >= set(DATASETS)
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
