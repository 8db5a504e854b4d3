"""Private parts of dependencies, and texts of theirs that have to be read, each with its reason.

`tests/test_compat.py` fails when a dependency changes one of them.
"""

from __future__ import annotations

import re
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

BatchNorm = _BatchNorm  # the base class of all batch norms; torch exports the subclasses only
DispatchMode = TorchDispatchMode  # documented, but under this private name only


def draws_random(operation: Any) -> bool:
    """Return whether an operation of a dispatch mode draws from a random generator."""
    return torch.Tag.nondeterministic_seeded in operation.tags


def written_arguments(operation: Any, arguments: Sequence[object]) -> list[object]:
    """Return those of an operation's arguments that it writes to; only its schema shows them."""
    declared = (argument.alias_info for argument in operation._schema.arguments)
    pairs = zip(declared, arguments, strict=False)
    return [value for alias, value in pairs if alias is not None and alias.is_write]


def compiler_phases() -> int:
    """Return how many phases of compilation this process has begun, forward and backward.

    The number grows every few seconds while graphs are compiled, which may take many minutes.
    torch has no public counter that grows while it compiles.
    """
    utils = sys.modules.get("torch._dynamo.utils")  # nothing is compiled before its import
    return sum(map(len, list(utils.compilation_time_metrics.values()))) if utils else 0


def found_overflow(
    scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, device: torch.device
) -> Tensor:
    """Return 1.0 on `device` where the last `scaler.step` found an overflow, else 0.0.

    The public way, comparing the scale before and after `update`, waits for the device.
    """
    found = scaler._found_inf_per_device(optimizer)
    return torch.stack([value.to(device) for value in found.values()]).amax()


class SelfUnscaling(torch.optim.Optimizer):
    """Base of optimizers that undo the scale of float16 and skip overflows themselves.

    GradScaler leaves it to optimizers with this private attribute, as to fused SGD, so that no step
    waits for the device.
    """

    _step_supports_amp_scaling = True

    def scale_and_overflow(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients' scale, and 1.0 where they overflowed, else 0.0; None without."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)


def compiler_patch(recompile_limit: int) -> AbstractContextManager[object]:
    """Return a context of the compiler's settings; see `compilation.compiler_settings`.

    torch has no public way to raise the limit, or to turn the cutting of blocks under DDP off.
    """
    from torch._dynamo import config as dynamo  # takes a second

    return dynamo.patch(recompile_limit=recompile_limit, suppress_errors=True, optimize_ddp=False)


def buffer_sync_off() -> dict[str, bool]:
    """Return DDP's argument that stops it from sending buffers to other ranks.

    torch 2.15 deprecates its older name, `broadcast_buffers`.
    """
    newer = "forward_sync_buffers"
    known = newer in signature(DistributedDataParallel).parameters
    return {newer if known else "broadcast_buffers": False}


def zero_all(tensors: Sequence[Tensor]) -> None:
    """Set each tensor to 0, with one kernel per device instead of one per tensor."""
    torch._foreach_zero_(list(tensors))


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target, with one kernel per device instead of one per tensor."""
    torch._foreach_copy_(list(targets), list(sources))


def greatest_magnitudes(tensors: Sequence[Tensor]) -> Tensor:
    """Return the greatest magnitude (len(tensors),) of each tensor; NaN where it has one."""
    return torch.stack(torch._foreach_norm(list(tensors), float("inf")))


def main_thread_stack(frames: int = 8) -> str:
    """Return the innermost frames of the main thread's stack, from any thread.

    Python has no public call for the stack of another thread but faulthandler, which needs a file.
    """
    main = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(main)[-frames:])


def is_port_in_use(error: dist.DistNetworkError) -> bool:
    """Return True where a store could not be opened as its port is taken.

    PyTorch has no error type or number for it; libuv and the socket layer word it differently.
    """
    text = str(error).lower()
    return "eaddrinuse" in text or "address already in use" in text


def describe_peer_loss(error: Exception) -> str:
    """Return what an error says of a rank that is lost, or silent beyond the time-out; else "".

    Gloo has no error type of its own, but each of its messages begins with its source file.
    """
    by_gloo = re.search(r"gloo/[^\]]*\] (.*)", str(error))
    if isinstance(error, RuntimeError) and by_gloo:
        return by_gloo[1].split(". ")[0]
    return str(error).splitlines()[0] if isinstance(error, dist.DistError) else ""


def kill_workers(loader: DataLoader) -> None:
    """End the worker processes of a DataLoader with persistent workers, even busy ones.

    The public way, to drop the loader, waits for each worker, and then sends SIGTERM, which
    workers that ignore stop signals never receive.
    """
    iterator = getattr(loader, "_iterator", None)  # None without workers
    if iterator is not None:
        iterator._shutdown_workers()
        for process in iterator._workers:
            process.kill()


def undetermined_operation(error: Exception) -> str:
    """Return the operation that has no deterministic implementation, if that is the error, or "".

    torch raises a plain RuntimeError for it.
    """
    found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
    return found[1] if isinstance(error, RuntimeError) and found else ""


def is_cuda_error(error: RuntimeError) -> bool:
    """Return whether DALI failed for a reason other than an image: it has no class for that."""
    return "CUDA" in str(error)
