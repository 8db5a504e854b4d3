"""The ranks of a run: who this process is, its device, the process group, exact reductions."""

# no postponed annotations here: DDP checks those of a communication hook
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from harness.errors import UserError
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
    """Reads torchrun's or SLURM's variables; `device` is `run.device` ("auto", "cpu", "cuda").

    Raises UserError where there are fewer GPUs than local ranks, or a variable is malformed.
    """
    try:
        launcher, ranks = _ranks(environment)
    except (KeyError, ValueError) as error:
        raise UserError(f"environment: {error}: missing or no number; use torchrun") from None
    rank, world_size, local_rank, local_world_size = ranks
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
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
    # SLURM_STEP_NUM_TASKS is set by srun, not in a batch script, where one process stands alone
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        ranks = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
        local = int(environment["SLURM_LOCALID"]), local_tasks(environment)
        return "slurm", (*ranks, *local)
    return "alone", (0, 1, 0, 1)


def gpu_advice(local_world_size: int, gpus: int) -> str:
    """One line on ranks against GPUs of this machine; empty where they match."""
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
    """A hint where this node has more GPUs than ranks; empty where all are used."""
    if world.device.type != "cuda" or world.launcher == "slurm":
        return ""
    return gpu_advice(world.local_world_size, torch.cuda.device_count())


@contextmanager
def process_group(
    world: World, store: dist.Store | None, hang_timeout_s: float
) -> Iterator[dist.ProcessGroup | None]:
    """Joins the ranks (NCCL on GPUs, Gloo on CPUs) and yields a second, Gloo group for control.

    `store` is where they met, by `rendezvous`. The control group carries small CPU messages beside
    the gradients, so that agreement between ranks never waits for the device. Yields None for a
    single rank, which needs no group.
    """
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if store is None:
        yield None
        return
    timeout = group_timeout(hang_timeout_s)
    dist.init_process_group(
        "nccl" if world.device.type == "cuda" else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.world_size,
        timeout=timeout,
    )
    try:
        control = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(control, dist.ProcessGroup)  # this rank is in it
        yield control
        with suppress(RuntimeError):  # a rank that fails in its last lines says so itself
            dist.barrier(control)  # the store may be in rank 0: nobody is to need it any more
    finally:
        dist.destroy_process_group()


def group_timeout(hang_timeout_s: float) -> timedelta:
    """Longer than the watchdog's, which can tell a rank that hangs from one that is slow."""
    return timedelta(seconds=2 * hang_timeout_s + 60)


def describe_peer_loss(error: Exception) -> str:
    """What an error says of a rank that is gone, or silent beyond the time-out; else ""."""
    # Gloo has no error type of its own, but each of its messages begins with its source file
    told_by_gloo = re.search(r"gloo/[^\]]*\] (.*)", str(error))
    if isinstance(error, RuntimeError) and told_by_gloo:
        return told_by_gloo[1].split(". ")[0]
    return str(error).splitlines()[0] if isinstance(error, dist.DistError) else ""


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sums `tensor` over all ranks, in place; exact for integers. Synchronises the ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.SUM)
    return tensor


def min_over_ranks(tensor: Tensor) -> Tensor:
    """The least value over all ranks, in place. Synchronises the ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor


def max_over_ranks(values: Sequence[float], group: dist.ProcessGroup | None) -> list[float]:
    """Of each value the greatest over the group's ranks; `values` as they are for a single rank."""
    greatest = torch.tensor(values, dtype=torch.float64)
    if group is not None:
        dist.all_reduce(greatest, dist.ReduceOp.MAX, group=group)
    return [float(value) for value in greatest]


def broadcast_from_rank0(value: T, group: dist.ProcessGroup | None) -> T:
    """Rank 0's `value`, on all ranks."""
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
    """Waits until all ranks of the group have come here; nothing for a single rank."""
    if group is not None:
        dist.barrier(group)


@dataclass
class Reductions:
    """How this rank sends its gradients, and how many buckets of them it has sent: where it stands
    in a backward pass."""

    dtype: torch.dtype | None = None  # that gradients are sent and summed in; None: their own
    sent: int = 0
    all_made: Callable[[], object] = lambda: None  # called when the last gradient is there


def sum_gradients(reductions: Reductions, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP communication hook: gradients are summed, not averaged, over all ranks.

    Remark 3 (section 3): each image's loss is divided by kn, so the all-reduce sums; the backward
    pass of an image then knows nothing of the number of ranks, in float16 too. In bfloat16
    (`run.gradient_precision`) each rank's gradients and their partial sums are rounded to 8 bits.
    """
    reductions.sent += 1
    if bucket.is_last():
        reductions.all_made()
    gradients = bucket.buffer()
    own_type = reductions.dtype in (None, gradients.dtype)
    sent = gradients if own_type else gradients.to(reductions.dtype)
    work = dist.all_reduce(sent, async_op=True)

    def received(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        summed = future.value()[0]
        return summed if own_type else gradients.copy_(summed)

    return work.get_future().then(received)
