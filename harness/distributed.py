"""The ranks of a run: who this process is, its device, the process group, exact reductions."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from harness.compat import describe_peer_loss
from harness.errors import UserError
from harness.network_interface import INTERFACE, gloo_interface
from harness.outcome import RunFailed
from harness.slurm_step import local_tasks

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The place of this process among the ranks.

    `launcher` is "torchrun" (RANK and WORLD_SIZE are set), "slurm" (a task of srun) or "alone".
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    device: torch.device


def world_from_environment(device: str, environment: Mapping[str, str] = os.environ) -> World:
    """Read torchrun's or SLURM's variables; `device` is `run.device` ("auto", "cpu", "cuda").

    Raises UserError where there are fewer GPUs than local ranks, or a variable is malformed.
    """
    try:
        launcher, ranks = _ranks(environment)
    except (KeyError, ValueError) as error:
        raise UserError(f"environment: {error}: missing or no number; use torchrun") from None
    rank, world_size, local_rank, local_world_size = ranks
    if uses_cpu(device):
        return World(*ranks, launcher, torch.device("cpu"))
    if not torch.cuda.is_available():
        raise UserError("run.device: cuda, but no CUDA device is usable here; set run.device=cpu")
    gpus = torch.cuda.device_count()
    if launcher == "slurm" and gpus == 1:  # srun bound one GPU to each task
        return World(*ranks, launcher, torch.device("cuda", 0))
    if local_world_size > gpus:
        raise UserError(gpu_advice(local_world_size, gpus))
    return World(
        rank, world_size, local_rank, local_world_size, launcher, torch.device("cuda", local_rank)
    )


def uses_cpu(device: str) -> bool:
    """Return whether `run.device` means the CPU on this machine."""
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def _ranks(environment: Mapping[str, str]) -> tuple[str, tuple[int, int, int, int]]:
    if "RANK" in environment or "WORLD_SIZE" in environment:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", rank))
        return "torchrun", (
            rank,
            world_size,
            local_rank,
            int(environment.get("LOCAL_WORLD_SIZE", world_size)),
        )
    # SLURM_STEP_NUM_TASKS is set by srun, not in a batch script, where one process runs by itself
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        ranks = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
        local = int(environment["SLURM_LOCALID"]), local_tasks(environment)
        return "slurm", (*ranks, *local)
    return "alone", (0, 1, 0, 1)


def gpu_advice(local_world_size: int, gpus: int) -> str:
    """Compare the local ranks with this machine's GPUs in one line; "" where they match."""
    if local_world_size == gpus:
        return ""
    if local_world_size > gpus:
        return (
            f"{local_world_size} ranks on a machine with {gpus} GPU{'s' * (gpus > 1)}: "
            f"one rank a GPU, so use torchrun --nproc-per-node {gpus}, or set run.device=cpu"
        )
    idle = gpus - local_world_size
    are = "is" if idle == 1 else "are"
    return f"{idle} of {gpus} GPUs {are} idle; to use all: torchrun --nproc-per-node {gpus}"


def idle_gpus(world: World) -> str:
    """Return a hint where this node has more GPUs than ranks; "" where all are used."""
    if world.device.type != "cuda" or world.launcher == "slurm":
        return ""
    return gpu_advice(world.local_world_size, torch.cuda.device_count())


@contextmanager
def process_group(
    world: World, store: dist.Store | None, hang_timeout_s: float
) -> Iterator[dist.ProcessGroup | None]:
    """Join the ranks (NCCL on GPUs, Gloo on CPUs) and yield a second, Gloo group for control.

    `store` is the one that `rendezvous` returned. The control group carries small CPU messages
    beside the gradients, so that agreement between ranks never waits for the device. Yields None
    for a single rank, which needs no group. Within, the rank's GPU is the current device.
    """
    cuda = world.device.type == "cuda"
    with torch.cuda.device(world.device) if cuda else nullcontext():
        if store is None:
            yield None
        else:
            with _joined(world, store, hang_timeout_s) as control:
                yield control


@contextmanager
def _joined(world: World, store: dist.Store, hang_timeout_s: float) -> Iterator[dist.ProcessGroup]:
    timeout = group_timeout(hang_timeout_s)
    try:
        with gloo_interface(store, world.rank, world.world_size), _named_interface():
            dist.init_process_group(
                "nccl" if world.device.type == "cuda" else "gloo",
                store=store,
                rank=world.rank,
                world_size=world.world_size,
                timeout=timeout,
            )
            control = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(control, dist.ProcessGroup)  # this rank is in it
        yield control
        # the store may live in rank 0, which must leave last; a rank that fails reports it itself
        with suppress(RuntimeError):
            dist.barrier(control)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _named_interface() -> Iterator[None]:
    """Raise RunFailed with the interface where Gloo cannot connect the ranks."""
    try:
        yield
    except RuntimeError as error:
        if not (why := describe_peer_loss(error)):
            raise
        name = os.environ.get(INTERFACE, "the interface of this host's own address")
        raise RunFailed(
            f"{socket.gethostname()}: Gloo cannot connect the ranks over {name} ({why}); set "
            f"{INTERFACE} to the interface that connects the nodes (ip -br addr shows them)"
        ) from error


def group_timeout(hang_timeout_s: float) -> timedelta:
    """Return a limit above the watchdog's, which can tell a hung rank from a slow one."""
    return timedelta(seconds=2 * hang_timeout_s + 60)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks, in place; exact for integers. Synchronises the ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.SUM)
    return tensor


def min_over_ranks(tensor: Tensor) -> Tensor:
    """Take the least value over all ranks, in place. Synchronises the ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor


def max_over_ranks(values: Sequence[float], group: dist.ProcessGroup | None) -> list[float]:
    """Return the greatest of each value over the group's ranks (None: a single rank)."""
    greatest = torch.tensor(values, dtype=torch.float64)
    if group is not None:
        dist.all_reduce(greatest, dist.ReduceOp.MAX, group=group)
    return [float(value) for value in greatest]


def broadcast_from_rank0(value: T, group: dist.ProcessGroup | None) -> T:
    """Return rank 0's `value` on all ranks."""
    values = [value]
    if group is not None:
        dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def first_reason(reason: str, group: dist.ProcessGroup | None) -> str:
    """Return the reason of the first rank that has one, on all ranks; "" where none has."""
    reasons = [reason]
    if group is not None:
        reasons = [""] * dist.get_world_size(group)
        dist.all_gather_object(reasons, reason, group=group)
    return next(filter(None, reasons), "")


def barrier(group: dist.ProcessGroup | None) -> None:
    """Wait for all ranks of the group; do nothing for a single rank."""
    if group is not None:
        dist.barrier(group)
