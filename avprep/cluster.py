"""Shards made on a Ray cluster: a task is a shard, made and written by its worker. It knows nothing of video.

What a task reports of its own failure is a result like any other; what it raises ends the run. A task whose worker or
node is lost is begun anew elsewhere.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from avprep.crew import Crew
from avprep.errors import AvprepError
from avprep.progress import Count

Task = TypeVar("Task")
Result = TypeVar("Result")
# Enough for machines that are taken away now and then; a shard that kills every worker ends the run after as many.
_ATTEMPTS = 10
# Tasks handed to Ray for each one that can run: no node waits for the planner, and none holds much of the list.
_TASKS_PER_SLOT, _FEWEST_TASKS = 2, 16
_MOST_CORES = 4  # of a task, where nobody says: with more, the last clips of a shard leave some idle
_CONNECT_S, _POLL_S, _TALLY_S = 10.0, 1.0, 5.0
# As on this machine (cli.py); it must be set before numpy is imported.
_ENVIRONMENT = {"env_vars": {"OPENBLAS_NUM_THREADS": "1"}}


def run_ray(ray: Any, do: Callable[[Task, Crew, Count], Result], tasks: Sequence[Task], count: Count,
            cores: int) -> Generator[Result, None, None]:
    """All of a Ray cluster; `do` is called there, and nothing but tasks and results travels.

    Args:
        ray: connected.
        do: makes a shard, with a crew of its own.
        tasks: the shards.
        count: shows the clips, wherever they are made.
        cores: that each task asks for.

    Raises:
        AvprepError: a task was lost too often.
    """
    def work(number: int, task: Task, tally: Any) -> tuple[Result, tuple[int, int]]:
        told = Count(tell=lambda done, expected: tally.tell.remote(number, done, expected))
        with told:
            result = do(task, _crew(cores), told)
        return result, (told.done, told.expected)

    remote: Any = ray.remote(num_cpus=cores, max_retries=_ATTEMPTS, scheduling_strategy="SPREAD")(work)
    tally: Any = ray.remote(num_cpus=0, max_restarts=-1)(_Tally).remote()
    waiting = list(enumerate(tasks))[::-1]
    under_way: dict[Any, int] = {}
    clips: dict[int, tuple[int, int]] = {}  # by the task's number: done, and expected beyond the list
    try:
        while waiting or under_way:
            slots = int(ray.cluster_resources().get("CPU", 0)) // cores
            while waiting and len(under_way) < max(_FEWEST_TASKS, _TASKS_PER_SLOT * slots):
                number, task = waiting.pop()
                under_way[remote.remote(number, task, tally)] = number
            ended, _ = ray.wait(list(under_way), timeout=_POLL_S)
            before = _sum(clips)
            with suppress(ray.exceptions.RayError):  # lost with its node; it comes back, and is only for the bar
                clips |= ray.get(tally.take.remote(), timeout=_TALLY_S)
            results = []
            for reference in ended:
                result, clips[under_way[reference]] = _result(ray, reference)
                del under_way[reference]
                results.append(result)
            now = _sum(clips)
            count.expect(now[1] - before[1])
            count.at_least(now[0])
            while results:  # whoever took a result decides whether it stays
                yield results.pop()
    finally:
        for reference in under_way:
            ray.cancel(reference, force=True)


@lru_cache(maxsize=1)
def _crew(cores: int) -> Crew:
    """The crew of a worker of Ray's, for all shards that it makes: it ends with that process."""
    return Crew(cores)


class _Tally:
    """What the tasks under way tell of their clips. Lives in the cluster."""

    def __init__(self) -> None:
        self._told: dict[int, tuple[int, int]] = {}

    def tell(self, number: int, done: int, expected: int) -> None:
        """So many clips of a task are done, and expected."""
        self._told[number] = done, expected

    def take(self) -> dict[int, tuple[int, int]]:
        """What was told since the last time, by task."""
        told, self._told = self._told, {}
        return told


def _sum(clips: dict[int, tuple[int, int]]) -> tuple[int, int]:
    return sum(done for done, _ in clips.values()), sum(expected for _, expected in clips.values())


def _result(ray: Any, reference: Any) -> Any:
    """What a task returned.

    Raises:
        AvprepError: its workers were lost too often. And what the task raised.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (AvprepError, OSError)):  # lines for people, not Ray's traceback
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise AvprepError(f"a shard's worker was lost {_ATTEMPTS + 1} times; the last time: {why}") from error


@contextmanager
def ray_cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected.

    Args:
        address: of the cluster: `host:port`, `ray://host:port`, or `auto`; None: what RAY_ADDRESS says, or a cluster
            that runs on this machine, or else one that is started here and ends with the run.

    Raises:
        AvprepError: ray is not installed, or there is no cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise AvprepError("--executor ray needs Ray: pip install 'avprep-avtrain[ray]'") from error
    if ray.is_initialized():  # whoever did that also ends it
        yield ray
        return
    wanted = os.environ.get("RAY_ADDRESS", address) if address in (None, "auto") else address
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL, "runtime_env": _ENVIRONMENT}
    _check_listening(wanted)
    try:
        ray.init(wanted or "auto", **options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        if wanted is not None:
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise AvprepError(f"no Ray cluster at {wanted} (--ray-address): {why}") from error
        ray.init("local", include_dashboard=False, **options)
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_listening(address: str | None) -> None:
    """Where nobody listens, Ray takes minutes to say so, or ends the process.

    Raises:
        AvprepError: nobody does.
    """
    if address is None or address in ("auto", "local"):
        return
    try:
        parts = urlsplit(address if "://" in address else f"ray://{address}")
        place = parts.hostname or "", parts.port or 0
    except ValueError:
        place = "", 0
    if not all(place):
        raise AvprepError(f"--ray-address {address}: it must be auto, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection(place, _CONNECT_S).close()
    except OSError as error:
        raise AvprepError(f"no Ray cluster at {address} (--ray-address): {error.strerror or error}") from error


def task_cores(ray: Any, workers: int | None) -> int:
    """How many cores each task asks for; where nobody says, those of the smallest node, at most 4.

    Raises:
        AvprepError: no node has so many.
    """
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    nodes = [cores for cores in nodes if cores] or [1]  # a head often has none
    if workers is not None and workers > max(nodes):
        raise AvprepError(f"--workers {workers}: with Ray these are the cores of one shard's task, and the largest "
                          f"node has {max(nodes)}")
    return workers or min(_MOST_CORES, *nodes)
