"""The house rules, read off the source: imports go down only, files stay small, nothing is set that nobody reads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_FILE_LINES = 400

# Floors: a module imports only from floors below its own.
AVPREP_FLOORS = [
    {"errors"}, {"spec", "executors", "progress", "sound", "probe", "__init__"}, {"datasets", "media", "logmel"},
    {"clips"},
    {"shards", "plan", "headers"}, {"probing", "account", "demo", "verify", "against",
                                                "preview"},
    {"build"}, {"cli"}]

AVTRAIN_FLOORS = [
    {"errors", "__init__", "progress", "files"}, {"config", "runtime", "metrics"}, {"tasks"},
    {"models", "data", "negatives"},
    {"objectives", "checkpoint", "engine"}, {"released", "evaluation", "features"},
    {"predictions"}, {"pretrain", "finetune", "outcome", "report", "source", "splits"}, {"probes"},
    {"transfer", "retrieval"}, {"cli"}]


def _modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def _imports(path):
    """Dotted names that a file imports, wherever in the file; those under TYPE_CHECKING are for the type checker."""
    tree = ast.parse(path.read_text())
    skipped = {id(node) for block in ast.walk(tree) if isinstance(block, ast.If)
               and "TYPE_CHECKING" in ast.dump(block.test) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room(dotted, package):
    """`avprep.datasets.kinetics` -> `datasets`."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == package else None


@pytest.mark.parametrize(("package", "floors"), [("avprep", AVPREP_FLOORS), ("avtrain", AVTRAIN_FLOORS)])
def test_imports_go_down_only(package, floors):
    floor = {room: number for number, rooms in enumerate(floors) for room in rooms}
    for path in _modules(package):
        room = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        if room == "__init__":
            continue  # the package's face: hands names on, late
        assert room in floor, f"{path.name} has no floor yet: give it one in this test"
        for dotted in _imports(path):
            below = _room(dotted, package)
            if below in floor and below != room:
                assert floor[below] < floor[room], f"{path.name} imports {dotted}"


def test_models_and_data_never_meet_and_the_engine_knows_neither():
    rooms = {path: {_room(dotted, "avtrain") for dotted in _imports(path)} for path in _modules("avtrain")}
    for path, imported in rooms.items():
        if path.parent.name == "models":
            assert imported <= {"models", "config", None}, path
        if path.parent.name == "data":
            assert imported <= {"data", "config", "errors", None}, path
    assert not rooms[ROOT / "avtrain/engine.py"] & {"models", "data", "objectives"}


def test_every_setting_is_read_somewhere():
    """Each field of the configuration is an attribute that some module other than config.py takes."""
    read = {node.attr for path in _modules("avtrain") if path.name != "config.py"
            for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    read |= {node.value for path in [ROOT / "avtrain/objectives.py"] for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for node in ast.walk(ast.parse((ROOT / "avtrain/config.py").read_text())):
        if isinstance(node, ast.ClassDef):
            for field in (entry.target.id for entry in node.body if isinstance(entry, ast.AnnAssign)):
                assert field in read, f"{node.name}.{field} is read nowhere"


def test_datasets_know_only_their_own_helpers():
    for path in _modules("avprep/datasets"):
        rooms = {_room(dotted, "avprep") for dotted in _imports(path)} - {None}
        assert rooms <= {"datasets", "errors"}, path.name


def test_the_packages_do_not_know_each_other():
    for package, others in (("avprep", ("avtrain", "torch", "webdataset")), ("avtrain", ("avprep",))):
        for path in _modules(package):
            assert not [dotted for dotted in _imports(path) if dotted.split(".")[0] in others], path


def test_files_stay_small_and_named_for_what_they_do():
    for package in ("avprep", "avtrain", "tests", "benchmarks"):
        for path in _modules(package):
            assert len(path.read_text().splitlines()) <= LONGEST_FILE_LINES, path
            assert path.stem not in ("utils", "util", "helpers", "misc", "common"), path


def test_only_cli_prints_or_exits():
    for package in ("avprep", "avtrain"):
        for path in _modules(package):
            if path.name != "cli.py":
                calls = {node.func.id for node in ast.walk(ast.parse(path.read_text()))
                         if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
                assert not calls & {"print", "exit", "quit"}, path


@pytest.mark.parametrize("package", ["avprep", "avtrain"])
def test_importing_the_package_is_light(package):
    code = f"import sys, {package}; print([name for name in ('torch', 'numpy', 'librosa') if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert printed.strip() == "[]"
