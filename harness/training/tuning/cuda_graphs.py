"""The trial of CUDA graphs before the first step: captured, checked and timed.

Graphs are used where each size of micro-batch gives the same gradients as without them, and where a
step's passes with their sum over the ranks are faster on the slowest rank (DDP overlaps the sum
with the backward pass only without graphs). The run keeps nothing else of the trial.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.distributed import first_reason, max_over_ranks
from harness.resilience.watchdog import Phase, Watchdog
from harness.training.graphed_model import Capture, CudaCapture
from harness.training.replica import Replica
from harness.training.tuning.micro_batch import random_pixels, too_little_memory

REPEATS = 5
GAIN = 0.02  # by which a step has to be faster
# relative to a gradient's norm: the same kernels round alike, while a stale input or a sum counted
# twice is far above
TOLERANCE = 0.01


@dataclass(frozen=True)
class GraphTrial:
    """The result of the trial: whether graphs are used, and the times of a step's passes.

    `refusal` says why they cannot be used; the times are None then, and without a trial.
    """

    used: bool = False
    refusal: str = ""
    plain_ms: float | None = None
    replayed_ms: float | None = None

    def __str__(self) -> str:
        if self.refusal:
            return f"not used: {self.refusal}"
        if self.plain_ms is None:
            return "none"
        times = f"{self.replayed_ms:.2f} ms a step's passes, {self.plain_ms:.2f} ms without"
        return f"used: {times}" if self.used else f"not used: no faster, {times}"


NO_TRIAL = GraphTrial()


def tune_cuda_graphs(
    replica: Replica,
    sizes: Sequence[int],
    control: dist.ProcessGroup | None,
    watchdog: Watchdog,
) -> GraphTrial:
    """Try graphs where `run.compile` is on and the device is a GPU; see `try_graphs`."""
    if replica.device.type != "cuda" or replica.config.run.compile is not True:
        return NO_TRIAL
    # a place behind all those of `tune_micro_batch`
    watchdog.enter_phase(0, Phase.STARTING, 2 * max(sizes))
    return try_graphs(replica, sizes, control)


def try_graphs(
    replica: Replica,
    sizes: Sequence[int],
    control: dist.ProcessGroup | None,
    capture: Capture | None = None,
) -> GraphTrial:
    """Leave the graphs in `replica` if they are worth replaying; return what was found.

    `sizes`: the images of each of this rank's micro-batches, in order. All ranks must call it
    together, and come to the same result. `capture`: None is CUDA's.
    """
    trial = GraphTrial(refusal=first_reason(_capture_all(replica, sizes, capture), control))
    if not trial.refusal:
        plain_ms, replayed_ms = max_over_ranks(_step_ms(replica, sizes), control)
        faster = replayed_ms < plain_ms * (1 - GAIN)
        trial = GraphTrial(faster, plain_ms=plain_ms, replayed_ms=replayed_ms)
    if not trial.used:
        replica.graphed.drop()
    _return_memory(replica.device)
    return trial


def _capture_all(replica: Replica, sizes: Sequence[int], capture: Capture | None) -> str:
    """Capture and check each size; return "", or why graphs cannot be used, in one line."""
    try:
        capture = capture or CudaCapture()
        for images in sorted(set(sizes), reverse=True):  # the largest first: others fit its memory
            replica.capture(_pixels(replica, images, 0), capture)
            if not (apart := _difference(replica, images)) <= TOLERANCE:
                return f"gradients of {images} images differ by {apart:.2g} of their norm"
        _return_memory(replica.device)  # what the passes took without graphs
        if too_little_memory(replica.device):
            return "less than 15 % of the memory would be free"
    except RuntimeError as error:  # torch.OutOfMemoryError too
        return f"not captured: {(str(error).splitlines() or [repr(error)])[0]}"
    finally:
        replica.forget_dry_passes()
    return ""


def _difference(replica: Replica, images: int) -> float:
    """Return the greatest relative difference that replaying makes to a gradient or a BN sum.

    It is taken after two micro-batches, with images and weights other than those captured.
    """
    found = []
    with _other_weights(replica.network):
        for replays in (False, True):
            replica.forget_dry_passes()
            with replica.graphed.replaying(replays):
                for seed in (1, 2):
                    replica.dry_pass(_pixels(replica, images, seed))
            left = replica.sums.local_sums()
            found.append([[tensor.double() for tensor in tensors] for tensors in left])
    return max(_apart(*pair) for pair in zip(*found, strict=True))


@contextmanager
def _other_weights(network: nn.Module) -> Iterator[None]:
    """Within, all weights are a little larger, including those that begin at 0."""
    own = [(weight, weight.detach().clone()) for weight in network.parameters()]
    with torch.no_grad():
        for weight, _ in own:
            weight.add_(0.01)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in own:
                weight.copy_(before)


def _apart(plain: Sequence[Tensor], replayed: Sequence[Tensor]) -> float:
    """Return the greatest |a - b| / |a|; infinite where only one of two numbers is finite."""
    both = list(zip(plain, replayed, strict=True))
    if not all(torch.equal(a.isfinite(), b.isfinite()) for a, b in both):
        return math.inf
    pairs = [
        [torch.nan_to_num(t, 0.0, 0.0, 0.0) for t in pair]  # float16 overflows in both
        for pair in both
    ]
    everything = math.sqrt(sum(float(a.norm()) ** 2 for a, _ in pairs))
    # a tensor that is all rounding is compared with the norm of all tensors
    least = max(TOLERANCE * everything, torch.finfo(torch.float64).tiny)
    return max((float((a - b).norm()) / max(float(a.norm()), least) for a, b in pairs), default=0.0)


def _step_ms(replica: Replica, sizes: Sequence[int]) -> tuple[float, float]:
    """Time the passes of a step and their sum over the ranks, plain and replayed.

    Returns the best of a few alternating measurements of each, in milliseconds.
    """
    pixels = {images: _pixels(replica, images, 0) for images in set(sizes)}

    def ms(replays: bool) -> float:
        start_s = time.perf_counter()
        with replica.graphed.replaying(replays):
            for number, images in enumerate(sizes, 1):
                replica.dry_pass(pixels[images], is_last=number == len(sizes))
        if replica.device.type == "cuda":
            torch.cuda.synchronize(replica.device)
        seconds = time.perf_counter() - start_s
        replica.forget_dry_passes()
        return 1000 * seconds

    pairs = [(ms(False), ms(True)) for _ in range(REPEATS + 2)][
        2:
    ]  # DDP rebuilds its buckets first
    plain, replayed = zip(*pairs, strict=True)
    return min(plain), min(replayed)


def _return_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _pixels(replica: Replica, images: int, seed: int) -> Tensor:
    return random_pixels(images, replica.config.data.crop, replica.device, seed)
