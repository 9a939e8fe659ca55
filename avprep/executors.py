"""Shards made on this machine: (do, tasks, count, workers) -> results as they come. It knows nothing of video.

What a task reports of its own failure is a result like any other; what it raises ends the run. `cluster.py` does the
same on Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import TypeVar

from avprep.crew import Crew
from avprep.progress import Count

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_local(do: Callable[[Task, Crew, Count], Result], tasks: Sequence[Task], count: Count,
              workers: int) -> Generator[Result, None, None]:
    """Threads of this process, one a shard; the `workers` of one crew make the clips of all shards under way."""
    # One more than workers: while each waits for the last clip of its shard, the next hands out work.
    with ThreadPoolExecutor(workers + 1) as pool, Crew(workers) as crew:
        waiting = {pool.submit(do, task, crew, count) for task in tasks}
        try:
            while waiting:
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                while ended:  # whoever took a result decides whether it stays
                    yield ended.pop().result()
        finally:
            for future in waiting:
                future.cancel()
