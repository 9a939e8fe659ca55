"""Where shards are made: functions (do, tasks, workers, count) -> results as they come. They know nothing of video.

What a task reports of its own failure is a result like any other; what it raises ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from avprep.crew import Crew
from avprep.errors import AvprepError
from avprep.progress import Count

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_local(do: Callable[[Task, Crew, Count], Result], tasks: Sequence[Task], workers: int,
              count: Count) -> Generator[Result, None, None]:
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


def run_ray(do: Callable[[Task, Crew, Count], Result], tasks: Sequence[Task], workers: int,
            count: Count) -> Generator[Result, None, None]:
    """A Ray cluster (RAY_ADDRESS, or one started here), with `workers` shards under way, one on each core.

    Raw files and shards must be on a file system that all nodes share.

    Raises:
        AvprepError: ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise AvprepError("--executor ray needs Ray: pip install 'avprep-avtrain[ray]'") from error
    ray.init(ignore_reinit_error=True, log_to_driver=False)

    def alone(task: Task) -> Result:
        with Crew(1) as crew:
            return do(task, crew, Count())

    remote: Any = ray.remote(alone)
    waiting = list(reversed(tasks))
    under_way: list[Any] = []
    while waiting or under_way:
        while waiting and len(under_way) < workers:
            under_way.append(remote.remote(waiting.pop()))
        ended, under_way = ray.wait(under_way)
        yield from map(ray.get, ended)


EXECUTORS = {"local": run_local, "ray": run_ray}
