"""`python -m benchmarks [NAME ...]`: all benchmarks or those named, in one table; exit code 1 if a bound is missed."""

from __future__ import annotations

import importlib
import sys

from benchmarks import Row

MODULES = ["prep", "data", "manifest", "features", "model"]


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in MODULES]
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)}; known are {', '.join(MODULES)}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for name in names or MODULES:
        rows += importlib.import_module(f"benchmarks.{name}").run()
    width = max(len(row.name) for row in rows)
    print(f"{'':<{width}}  {'ours':>10}  {'baseline':>10}  {'ratio':>6}  {'bound':>8}  ok")
    for row in rows:
        print(f"{row.name:<{width}}  {row.ours:>8.3f} {row.unit:<3} {row.baseline:>7.3f} {row.unit:<3} "
              f"{row.ratio:>5.2f}  {row.bound:>8}  {'yes' if row.ok else 'NO'}")
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
