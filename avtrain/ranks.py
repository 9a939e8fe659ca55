"""The processes of one run, as torchrun or Slurm's srun starts them; by itself, a process is the only one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from avtrain.errors import AvtrainError, in_a_line

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
    if not dist.is_initialized():
        return value
    values = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX, group=_host_group)
    return float(values)


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
