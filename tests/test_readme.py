"""What the README and the pages of docs/ show works: commands, options, settings, targets, files, links, examples."""

import json
import re
import shlex
import subprocess
import typing
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", ROOT / "shards" / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES["README.md"]
LONGEST_README_LINES = 120


def _blocks(page):
    return [block.splitlines() for block in re.findall(r"^```\w*\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)]


def _commands(page):
    return [line.split("#")[0].strip() for block in _blocks(page) for line in block
            if re.match(r"(avprep|avtrain|make) ", line)]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in _commands(page)))


def _anchor(heading):
    """The name of a heading in an address, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _anchors(page):
    return {_anchor(heading) for heading in re.findall(r"^#+ (.*)$", PAGES[page], re.MULTILINE)}


def test_the_first_commands_are_the_two_of_make():
    first = [line.split("#")[0].split() for line in _blocks("README.md")[0]]
    assert first == [["make", "pretrain"], ["make", "test"]]


def test_readme_is_short():
    assert len(README.splitlines()) <= LONGEST_README_LINES


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


@pytest.mark.parametrize("command", [command for command in COMMANDS if " --set " in command])
def test_settings_of_commands_are_accepted(command, tmp_path, monkeypatch):
    """In an empty folder a command ends at the first thing that is missing there, which is no setting."""
    from avtrain.cli import main

    monkeypatch.chdir(tmp_path)
    start = ["--init", "random", "--preset", "tiny"] if "eval" in command and "--init" not in command else []
    done = CliRunner().invoke(main, [*shlex.split(command)[1:], *start])
    assert done.exit_code == 1 and "index.json" in done.output, done.output


def test_settings_in_the_text_exist():
    from avtrain.config import Config

    sections = {name: typing.get_type_hints(kind) for name, kind in typing.get_type_hints(Config).items()}
    named = [(page, section, field) for page, text in PAGES.items()
             for section, field in re.findall(r"`(\w+)\.([a-z_]+)`", text) if section in sections and field not in
             ("safetensors", "pt")]  # which are files
    assert len(named) > 5
    assert [place for place in named if place[2] not in sections[place[1]]] == []


def test_avprep_commands_of_the_readme_run_as_written(avprep, tiny_demo, tmp_path):
    (tmp_path / "my_videos").symlink_to(tiny_demo)
    run = [command for command in _commands("README.md") if command.startswith("avprep")]
    assert len(run) == 4
    for command in run:
        done = avprep(*shlex.split(command)[1:], cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


def test_commands_on_the_demo_run_as_written(avprep, demo_shards, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "demo").symlink_to(demo_shards)
    run = [command for command in _commands("docs/quickstart.md") if command.startswith("avprep")
           and "shards/demo" in command]
    assert len(run) >= 3
    for command in run:
        done = avprep(*shlex.split(command)[1:], cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_reading_example_of_the_format_runs(demo_shards, tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "demo").symlink_to(demo_shards)
    example = re.search(r"```python\n(.*?)```", PAGES["shards/README.md"], flags=re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert names["sample"]["logmel.npy"].shape == (80, 1920)


def test_the_example_of_an_adapter_lists(tmp_path):
    example = re.search(r"```python\n(.*?)```", PAGES["docs/extending.md"], flags=re.DOTALL).group(1)
    names = {}
    exec(example, names)
    (tmp_path / "list.csv").write_text("file,class\na.mp4,dog\nb.mp4,cat\ngone.mp4,cat\n")
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    listing = names["find"](tmp_path, *names["splits"](tmp_path))
    assert listing.classes == ["cat", "dog"]
    assert [(source.name, source.labels) for source in listing.sources] == [("a.mp4", (1,)), ("b.mp4", (0,))]
    assert [(skipped.name, skipped.reason) for skipped in listing.skipped] == [("gone.mp4", "listed, but no such file")]


def test_every_dataset_and_task_has_a_row():
    from avprep.datasets import DATASETS
    from avtrain.transfer.tasks import TASKS

    for page, head, known in (("docs/datasets.md", "| `--dataset`", DATASETS), ("docs/transfer.md", "| task |", TASKS)):
        table = PAGES[page][PAGES[page].index(head):].split("\n\n")[0]
        first_column = "".join(row.split("|")[1] for row in table.splitlines())
        assert set(re.findall(r"`([a-z0-9-]+)`", first_column)) >= set(known)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
        assert there.exists(), target
        if anchor:
            assert anchor in _anchors(there.relative_to(ROOT).as_posix()), target


def test_every_page_is_in_the_site_and_in_the_readme_or_beside_it():
    """A page that no other one names is found by nobody."""
    for page in PAGES:
        name = Path(page).stem
        if page.startswith("docs/") and name != "index":
            assert re.search(rf"^{name}$", PAGES["docs/index.md"], flags=re.MULTILINE), page


def test_messages_in_troubleshooting_are_those_of_the_code():
    """Each piece of a message between the dots stands in the source, where a text may go over several lines."""
    source = "".join(path.read_text(encoding="utf-8") for package in ("avprep", "avtrain")
                     for path in sorted((ROOT / package).rglob("*.py")))
    source = re.sub(r"[\"']\s*\n\s*(\+ )?f?[\"']", "", source)  # what Python joins
    source = re.sub(r"\{[^{}]*\}", "...", source).replace("`", "")
    rows = re.findall(r"^\| (`.*?) \|", PAGES["docs/troubleshooting.md"], flags=re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 40
    between = r"\.\.\.|\(.*?\)|\S+\.(?:json|parquet)|/dev/shm"
    pieces = [piece.strip(" ;:,") for message in messages for piece in re.split(between, message)]
    assert [piece for piece in pieces if len(piece) > 10 and piece not in source] == []


@pytest.mark.slow
def test_commands_of_stores_run_as_written(avprep, small_demo, bucket, tmp_path, monkeypatch):
    from avtrain.cli import main as avtrain_main

    monkeypatch.chdir(tmp_path)
    for name, value in {"AVTRAIN_CACHE": str(tmp_path / "cache"), "AVTRAIN_CACHE_GB": ""}.items():
        monkeypatch.setenv(name, value)
    for path in small_demo.rglob("*.mp4"):
        bucket.pipe_file(f"bucket/demo/{path.relative_to(small_demo).as_posix()}", path.read_bytes())
    commands = [command for command in _commands("docs/scaling.md") if "s3://" in command]
    prepares = [command for command in commands if command.startswith("avprep")]
    trains = [command for command in commands if command.startswith("avtrain")]
    assert [command.split()[1] for command in prepares] == ["build", "info", "verify", "preview"]
    for command in prepares:
        done = avprep(*shlex.split(command)[1:])
        assert done.returncode == 0, done.stderr
    small = ["--max-steps", "1", "--device", "cpu", "--preset", "sound", "--set", "training.batch_size=4", "--set",
             "model.dimension=32", "--set", "data.workers=1"]
    for number, train in enumerate(trains):
        trained = CliRunner().invoke(avtrain_main, [*shlex.split(train)[1:], *small, "--out", f"runs/{number}"])
        assert trained.exit_code == 0, trained.output
    held_out = [any(name.startswith("test_") for name in json.loads(line)) for line in
                (Path(f"runs/{number}/metrics.jsonl").read_text().splitlines()[-1] for number in range(len(trains)))]
    assert held_out == [not command.partition("--shards ")[2].split()[0].endswith("/train") for command in trains]
