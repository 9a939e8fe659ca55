"""Where tasks run: functions (do, tasks, workers) -> results in the order of the tasks. They know nothing of video.

What a task reports of its own failure is a result like any other; what it raises ends the run. At any time only a few
tasks a worker are under way or waiting to be taken, so memory does not grow with the number of tasks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from avprep.errors import AvprepError

Task = TypeVar("Task")
Result = TypeVar("Result")
Handle = TypeVar("Handle")
_UNDER_WAY_PER_WORKER = 4


def _in_order(submit: Callable[[Task], Handle], take: Callable[[Handle], Result], tasks: Iterable[Task],
              most: int) -> Generator[Result, None, None]:
    under_way: deque[Handle] = deque()
    for task in tasks:
        under_way.append(submit(task))
        if len(under_way) >= most:
            yield take(under_way.popleft())
    while under_way:
        yield take(under_way.popleft())


def run_local(do: Callable[[Task], Result], tasks: Iterable[Task],
              workers: int) -> Generator[Result, None, None]:
    """Threads of this process: the work is ffmpeg's, a process of its own for each clip, and numpy's."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield from _in_order(lambda task: pool.submit(do, task), lambda future: future.result(), tasks,
                             _UNDER_WAY_PER_WORKER * workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_ray(do: Callable[[Task], Result], tasks: Iterable[Task],
            workers: int) -> Generator[Result, None, None]:
    """A Ray cluster (RAY_ADDRESS, or one started here); the raw files must be on a file system that all nodes share.

    Raises:
        AvprepError: ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise AvprepError("--executor ray needs Ray: pip install 'avprep-avtrain[ray]'") from error
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    remote: Any = ray.remote(lambda task: do(task))  # it takes a plain function, not a partial one
    yield from _in_order(remote.remote, lambda handle: ray.get(handle), tasks, _UNDER_WAY_PER_WORKER * workers)


EXECUTORS = {"local": run_local, "ray": run_ray}
