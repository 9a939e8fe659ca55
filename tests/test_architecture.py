"""The house rules, read off the source: imports go down only, files stay small, nothing is set that nobody reads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LONGEST_FILE_LINES = 400

# Meetings that are forbidden, in either direction; that no rooms import each other in a circle is found, not listed.
FORBIDDEN = [("models", "data"), ("pretraining", "transfer"), ("checkpoints", "data")]
ENGINE_KNOWS_NONE_OF = {"models", "data", "pretraining", "transfer", "checkpoints"}


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


def _modules_imported(package):
    """module -> the modules of the package that it imports, late imports included; packages' faces are left out."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in _modules(package)
             if path.name != "__init__.py" or path.parent.name == "datasets"}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    return {name: {dotted for dotted in _imports(path) if dotted in names and dotted != name}
            for name, path in names.items()}


def _circle(graph):
    """Some circle of a graph {node: nodes}, as a list; [] if there is none."""
    done, path = set(), []

    def walk(node):
        if node in path:
            return path[path.index(node):] + [node]
        if node in done:
            return []
        path.append(node)
        found = next((circle for below in sorted(graph.get(node, ())) if (circle := walk(below))), [])
        path.pop()
        done.add(node)
        return found

    return next((circle for node in sorted(graph) if (circle := walk(node))), [])


@pytest.mark.parametrize("package", ["avprep", "avtrain"])
def test_imports_run_in_no_circle(package):
    modules = _modules_imported(package)
    rooms = {}
    for name, imported in modules.items():
        room = _room(name, package)
        rooms.setdefault(room, set()).update({_room(one, package) for one in imported} - {room})
    assert _circle(modules) == [], "modules import each other"
    assert _circle(rooms) == [], "rooms import each other"
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]  # one would be found


def test_rooms_that_must_not_meet():
    for name, imported in _modules_imported("avtrain").items():
        for one in imported:
            meeting = {_room(name, "avtrain"), _room(one, "avtrain")}
            assert not any(meeting == set(pair) for pair in FORBIDDEN), f"{name} imports {one}"
    engine = {_room(dotted, "avtrain") for dotted in _imports(ROOT / "avtrain/engine.py")}
    assert not engine & ENGINE_KNOWS_NONE_OF
    for path in _modules("avtrain/models"):
        assert {_room(dotted, "avtrain") for dotted in _imports(path)} <= {"models", "config", "ranks", "runtime",
                                                                           None}, path


def test_every_setting_is_read_somewhere():
    """Each field of the settings is an attribute that some module takes, other than those that define settings."""
    defined = [ROOT / "avtrain/config.py", ROOT / "avtrain/transfer/protocols.py"]
    read = {node.attr for path in _modules("avtrain") if path not in defined
            for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    objectives = ast.parse((ROOT / "avtrain/pretraining/objectives.py").read_text())
    read |= {node.value for node in ast.walk(objectives)
             if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for node in (node for path in defined for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.ClassDef):
            for field in (entry.target.id for entry in node.body if isinstance(entry, ast.AnnAssign)):
                assert field in read, f"{node.name}.{field} is read nowhere"


def test_datasets_know_only_their_own_helpers():
    for path in _modules("avprep/datasets"):
        rooms = {_room(dotted, "avprep") for dotted in _imports(path)} - {None}
        assert rooms <= {"datasets", "errors"}, path.name


def test_the_packages_do_not_know_each_other():
    for package, others in (("avprep", ("avtrain", "torch")), ("avtrain", ("avprep",))):
        for path in _modules(package):
            assert not [dotted for dotted in _imports(path) if dotted.split(".")[0] in others], path


def test_only_who_writes_shards_loads_webdataset():
    """It brings torch, in seconds."""
    for path in _modules("avprep"):
        names = [dotted.split(".")[0] for dotted in _imports(path)]
        assert "webdataset" not in names or path.name == "shards.py", path
    code = ("import sys, avprep.build, avprep.demo, avprep.inspect.verify, avprep.inspect.preview, "
            "avprep.inspect.against; print([name for name in ('torch', 'webdataset') if name in sys.modules])")
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert printed.strip() == "[]"


def test_files_stay_small_and_named_for_what_they_do():
    for package in ("avprep", "avtrain", "tests", "benchmarks"):
        for path in _modules(package):
            assert len(path.read_text().splitlines()) <= LONGEST_FILE_LINES, path
            assert path.stem not in ("utils", "util", "helpers", "misc", "common"), path


def test_what_is_not_code_is_packaged_too():
    """Presets and templates: what an installation from a wheel would lack."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        packaged = tomllib.load(file)["tool"]["setuptools"]["package-data"]
    for package in ("avprep", "avtrain"):
        there = {path for path in (ROOT / package).rglob("*")
                 if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts}
        listed = {path for pattern in packaged.get(package, ()) for path in (ROOT / package).glob(pattern)}
        assert there <= listed, there - listed


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
