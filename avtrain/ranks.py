"""The processes of one run, as torchrun or Slurm's srun starts them; by itself, a process is the only one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from avtrain.errors import AvtrainError, Elsewhere, in_a_line

_T = TypeVar("_T")

_PATIENCE = timedelta(hours=6)  # the others wait as long while the first one evaluates; whoever ends is noticed at once
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")  # the second is srun's: not set in a batch script
_host_group: Any = None  # for what hosts tell each other without waiting for a device


def started_with(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """(rank, ranks, rank on this machine), from what torchrun sets, or srun; (0, 1, 0) for a process by itself.

    Raises:
        AvtrainError: under srun, the address where the processes meet is not set.
    """
    for names in (_TORCHRUN, _SLURM):
        if all(name in environment for name in names):
            rank, ranks, local = (int(environment[name]) for name in names)
            if ranks > 1 and ("MASTER_ADDR" not in environment or "MASTER_PORT" not in environment):
                raise AvtrainError(f"{ranks} processes were started, but MASTER_ADDR and MASTER_PORT, where they meet, "
                                   "are not set: see docs/scaling.md, or use torchrun")
            return rank, ranks, local
    return 0, 1, 0


def begin(device: torch.device) -> None:
    """Meet the other processes, if there are any.

    Raises:
        AvtrainError: they can't be met.
    """
    global _host_group
    rank, count, _ = started_with()
    if count == 1 or dist.is_initialized():
        return
    try:
        # torchrun keeps one store through its restarts (torch 2.13), in which those that are gone can still be found.
        store, *_ = next(rendezvous("env://", rank, count, timeout=_PATIENCE))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # on several machines, each counts restarts for itself
            store = PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=count,
                                timeout=_PATIENCE)
        _host_group = dist.new_group(backend="gloo", timeout=_PATIENCE) if device.type == "cuda" else None
    except (RuntimeError, ValueError) as error:
        raise AvtrainError(f"the {count} processes don't meet: {in_a_line(error)}; restarts on several machines need "
                           "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun") from error


def end() -> None:
    """Part from the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(values: Tensor) -> Tensor:
    """The sum over the processes, without gradient; the device isn't waited for."""
    if not dist.is_initialized():
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def largest(value: float) -> float:
    """The largest of the processes' values, by way of the hosts alone."""
    return largest_of_each(value)[0]


def largest_of_each(*values: float) -> list[float]:
    """The same, of each of several values, at once."""
    if not dist.is_initialized():
        return list(values)
    each = torch.tensor(values, dtype=torch.float64)
    with _told_in_a_line():
        dist.all_reduce(each, dist.ReduceOp.MAX, group=_host_group)
    return [float(value) for value in each]


class Gone(AvtrainError):
    """Another process of the run is there no more."""


@contextmanager
def _told_in_a_line() -> Iterator[None]:
    """Who ends is noticed by those who wait for it.

    Raises:
        Gone: somebody ended.
    """
    try:
        yield
    except RuntimeError as error:
        raise Gone("another process of this run has ended: what it said of it stands further up, or in its own "
                   "log") from error


def agree(error: AvtrainError | OSError | None = None) -> None:
    """Wait for all processes to be here. Where one of them has an error, none goes on.

    Raises:
        AvtrainError, OSError: this one's own.
        Elsewhere: another one's.
    """
    if not dist.is_initialized():
        if error is not None:
            raise error
        return
    failed = ranks() - int(largest(0.0 if error is None else ranks() - rank()))
    if failed < ranks():
        told = [in_a_line(error) if error is not None and failed == rank() else ""]
        with _told_in_a_line():
            dist.broadcast_object_list(told, failed, group=_host_group)
        raise error or Elsewhere(failed, told[0])


def by_first(make: Callable[[], _T]) -> _T:
    """What the first process makes, on all of them: what depends on files, or writes some. The others wait for it.

    Raises:
        AvtrainError, OSError: on the first process, what `make` raises; `Elsewhere` on the others.
    """
    made: list[Any] = [None]
    error: AvtrainError | OSError | None = None
    if rank() == 0:
        try:
            made = [make()]
        except (AvtrainError, OSError) as failed:
            error = failed
    agree(error)
    if dist.is_initialized():
        with _told_in_a_line():
            dist.broadcast_object_list(made, 0, group=_host_group)
    return cast(_T, made[0])


def collected(item: Any) -> list[Any]:
    """An item of each process, on the first of them; [] on the others."""
    if not dist.is_initialized():
        return [item]
    items = [None] * ranks() if rank() == 0 else None
    with _told_in_a_line():
        dist.gather_object(item, items, 0, group=_host_group)
    return items or []


def averaging(network: nn.Module, device: torch.device, synced: bool, unused: bool = False) -> Any:
    """The network as all processes train it together; gradients are averaged after the last part of a batch.

    Args:
        network: of this process; itself where there is no other one.
        device: that it is on.
        synced: its averages are those of all processes already.
        unused: a step may have no gradient for some parameters.
    """
    if ranks() == 1:
        return network
    devices = [device] if device.type == "cuda" else None
    # Another name from torch 2.13 on, with a warning about the old one.
    named = signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"
    options: dict[str, Any] = {buffers: not synced, "find_unused_parameters": unused}
    return DistributedDataParallel(network, devices, **options)


def gathered(values: Tensor) -> Tensor:
    """(n, ...) of each process -> (ranks * n, ...), the same everywhere, with gradients; n is the same for all."""
    if not dist.is_initialized():
        return values
    together: Tensor = _Gathered.apply(values)  # type: ignore[no-untyped-call]
    return together


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        context.count = len(values)
        return _gather(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        first = rank() * context.count
        return total[first:first + context.count]


def _gather(values: Tensor) -> Tensor:
    parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(ranks())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)
