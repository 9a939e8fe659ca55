"""Does this tree do what another commit did, to the bit? Both run in turn on this machine; no numbers are stored.

    python tests/identical.py BASE [--only shards,losses,eval,parity] [--keep FOLDER]

Compared: every member of every shard of a small demo and of ../shared/media, by key; the losses of 60 steps of the tiny
preset in float32, stopped and resumed in the middle, and the weights after them; figures of finetune, linear and knn on
the small demo; and, of this tree alone, the tests of parity with the authors' numbers. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MEDIA = Path(os.environ.get("AV_SHARED", ROOT.parent / "shared")) / "media"
PARTS = ("shards", "losses", "eval", "parity")
STEPS = 60
# What depends on the clock or on the machine's other work, or is new in one of the two.
TIMINGS = ("clips_per_s", "waiting_share", "memory_gib", "evaluation_s")
PROTOCOLS = {"linear": [], "knn": [], "finetune": ["--set", "transfer.epochs=1"]}


class Tree:
    """One of the two commits, and the folder that its commands write to."""

    def __init__(self, code: Path, work: Path) -> None:
        self.code, self.work = code, work
        work.mkdir(parents=True, exist_ok=True)

    def run(self, package: str, *arguments: object) -> None:
        """A command of this tree, in its folder."""
        done = subprocess.run([sys.executable, "-m", f"{package}.cli", *map(str, arguments)], cwd=self.work,
                              env=os.environ | {"PYTHONPATH": str(self.code), "OMP_WAIT_POLICY": "PASSIVE"},
                              capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{self.code}: {package} {' '.join(map(str, arguments))}\n{done.stderr[-2000:]}")


def build(tree: Tree) -> None:
    """The small demo, and the real media where they are."""
    if (tree.work / "shards/demo/test/index.json").is_file():
        return
    tree.run("avprep", "demo", "--out", "data/demo", "--train", 24, "--test", 8)
    tree.run("avprep", "build", "--dataset", "demo", "--split", "all", "--shard-mb", 3)
    if MEDIA.is_dir():
        tree.run("avprep", "build", "--dataset", "folder", "--raw", MEDIA, "--shard-mb", 3)


def members(tree: Tree) -> dict[str, str]:
    """Checksums of all that stands in the tars, by dataset, split and member; a json without what only one has."""
    found = {}
    for path in sorted(tree.work.glob("shards/*/*/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                name = "/".join((*path.parts[-3:-1], member.name))
                found[name] = content.decode() if name.endswith(".json") else hashlib.sha256(content).hexdigest()
    return found


def of_both(one: Any, other: Any) -> tuple[Any, Any]:
    """Two dictionaries with the fields that both have: a field that is new is no difference."""
    shared = set(one) & set(other) - set(TIMINGS)
    return {name: one[name] for name in shared}, {name: other[name] for name in shared}


def compare_shards(base: Tree, here: Tree) -> list[str]:
    """What differs in the members of the shards."""
    before, after = members(base), members(here)
    wrong = [f"{name}: only in {'this tree' if name in after else 'the base'}" for name in before.keys() ^ after.keys()]
    for name in sorted(before.keys() & after.keys()):
        one, other = before[name], after[name]
        if name.endswith(".json"):
            one, other = of_both(json.loads(one), json.loads(other))
        if one != other:
            wrong.append(f"{name} differs")
    print(f"shards: {len(after)} members", flush=True)
    return wrong


def pretrain(tree: Tree) -> None:
    """60 steps, the second half by another process."""
    if (tree.work / "run/checkpoints" / f"step-{STEPS:06d}").is_dir():
        return
    wanted = ["--shards", "shards/demo", "--preset", "tiny", "--out", "run", "--precision", "float32", "--set",
              f"training.steps={STEPS}", "--set", "training.evaluate_every=30", "--set", "training.save_every=30"]
    tree.run("avtrain", "pretrain", *wanted, "--max-steps", STEPS // 2)
    tree.run("avtrain", "pretrain", *wanted, "--resume")


def compare_losses(base: Tree, here: Tree) -> list[str]:
    """What differs in the lines of metrics.jsonl and in the weights at the end."""
    lines = [[json.loads(line) for line in (tree.work / "run/metrics.jsonl").read_text().splitlines()]
             for tree in (base, here)]
    wrong = [] if len(lines[0]) == len(lines[1]) == STEPS else [f"{len(lines[0])} and {len(lines[1])} steps"]
    for one, other in zip(*lines, strict=False):
        before, after = of_both(one, other)
        if before != after:
            names = ", ".join(f"{name} {before[name]} and {after[name]}" for name in before
                              if before[name] != after[name])
            wrong.append(f"step {one['step']}: {names}")
    weights = [(tree.work / f"run/checkpoints/step-{STEPS:06d}/model.safetensors") for tree in (base, here)]
    wrong += [f"weight {name} differs" for name in different_weights(*weights)]
    print(f"losses: {len(lines[1])} steps, the last {lines[1][-1]['loss']}", flush=True)
    return wrong


def different_weights(one: Path, other: Path) -> list[str]:
    """Names of the tensors that are not the same in two files."""
    from safetensors.numpy import load_file

    before, after = load_file(one), load_file(other)
    return sorted(before.keys() ^ after.keys()) + sorted(
        name for name in before.keys() & after.keys() if before[name].tobytes() != after[name].tobytes())


def evaluate(tree: Tree) -> None:
    """The checkpoint of `pretrain` by each protocol."""
    for protocol, more in PROTOCOLS.items():
        if not (tree.work / "eval" / protocol / "results.json").is_file():
            tree.run("avtrain", "eval", "--task", "demo", "--checkpoint",
                     f"run/checkpoints/step-{STEPS:06d}/model.safetensors", "--protocol", protocol, "--recipe", "small",
                     "--precision", "float32", "--out", f"eval/{protocol}", *more)


def compare_eval(base: Tree, here: Tree) -> list[str]:
    """What differs in the figures of results.json."""
    wrong = []
    for protocol in PROTOCOLS:
        one, other = (json.loads((tree.work / "eval" / protocol / "results.json").read_text())["splits"]
                      for tree in (base, here))
        print(f"eval {protocol}: {other}", flush=True)
        if one != other:
            wrong.append(f"eval {protocol}: {one} and {other}")
    return wrong


def compare_parity(here: Tree) -> list[str]:
    """Whether the tests against the authors' numbers pass."""
    files = ["models/test_model.py", "checkpoints/test_released.py", "models/test_lowrank.py"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *(f"tests/avtrain/{file}" for file in files),
                           "tests/avprep/test_logmel.py"], cwd=here.code, capture_output=True, text=True, check=False)
    print(f"parity: {done.stdout.strip().splitlines()[-1]}", flush=True)
    return [] if done.returncode == 0 else ["tests of parity fail"]


def main() -> None:
    """Print what was compared, and every difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a commit")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--keep", type=Path, help="a folder to work in and to leave; what it holds is not made again")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.keep or Path(temporary)).absolute()
        code = Path(temporary) / "base"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", code, arguments.base], check=True)
        try:
            base, here = Tree(code, work / "base"), Tree(ROOT, work / "here")
            wrong: list[str] = []
            for step, part in ((build, "shards"), (pretrain, "losses"), (evaluate, "eval")):
                needed = any(one in PARTS and PARTS.index(one) >= PARTS.index(part) for one in parts if one != "parity")
                for tree in (base, here):
                    if needed:
                        step(tree)
            for part, compare in (("shards", compare_shards), ("losses", compare_losses), ("eval", compare_eval)):
                wrong += compare(base, here) if part in parts else []
            wrong += compare_parity(here) if "parity" in parts else []
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", code], check=True)
    print("\n".join(wrong) or "identical")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
