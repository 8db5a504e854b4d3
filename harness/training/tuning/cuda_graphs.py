"""Whether passes are replayed as CUDA graphs: captured, checked and timed before the first step.

They are used where each size of micro-batch gives the gradients that it gives without, and a step's
passes with their sum over the ranks are faster on the slowest rank: DDP sums beside a backward pass
only without. Nothing else of the trial stays in the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.distributed import first_reason, max_over_ranks
from harness.training.step import Step
from harness.training.graphed_model import Capture, CudaCapture
from harness.training.tuning.micro_batch import random_pixels, too_little_memory

REPEATS = 5
GAIN = 0.02  # by which a step has to be faster
# of a gradient's norm: the same kernels round alike, and a stale input or a sum that is counted
# twice is far above
TOLERANCE = 0.01


def try_graphs(
    step: Step,
    sizes: Sequence[int],
    control: dist.ProcessGroup | None,
    capture: Capture | None = None,
) -> None:
    """Leaves in `step` the passes that are worth replaying, and in `step.graphs` what was found.

    `sizes`: the images of each of this rank's micro-batches, in order. All ranks call it at once,
    and come to the same end. `capture`: CUDA's where None.
    """
    faster = False
    if why := first_reason(_captured(step, sizes, capture), control):
        step.graphs = f"not used: {why}"
    else:
        plain_ms, replayed_ms = max_over_ranks(_step_ms(step, sizes), control)
        faster = replayed_ms < plain_ms * (1 - GAIN)
        found = f"{replayed_ms:.2f} ms a step's passes, {plain_ms:.2f} ms without"
        step.graphs = f"used: {found}" if faster else f"not used: no faster, {found}"
    step.graphed.replays = True
    if not faster:
        step.graphed.drop()
    _return_memory(step.device)


def _captured(step: Step, sizes: Sequence[int], capture: Capture | None) -> str:
    """Captures each size and checks it; empty where all is well, else why not, in a line."""
    try:
        capture = capture or CudaCapture()
        for images in sorted(set(sizes), reverse=True):  # the largest first: others fit its memory
            step.capture(_pixels(step, images, 0), capture)
            if not (apart := _difference(step, images)) <= TOLERANCE:
                return f"gradients of {images} images differ by {apart:.2g} of their norm"
        _return_memory(step.device)  # that the passes took without replaying
        if too_little_memory(step.device):
            return "less than 15 % of the memory would be free"
    except RuntimeError as error:  # torch.OutOfMemoryError too
        return f"not captured: {(str(error).splitlines() or [repr(error)])[0]}"
    finally:
        step.forget_dry_passes()
    return ""


def _difference(step: Step, images: int) -> float:
    """The greatest relative difference of a gradient, or of a batch norm's sums, with and without
    replaying: after two micro-batches, with images and weights other than those captured."""
    found = []
    with _other_weights(step.network):
        for replays in (False, True):
            step.graphed.replays = replays
            step.forget_dry_passes()
            for seed in (1, 2):
                step.dry_pass(_pixels(step, images, seed))
            gradients = [p.grad for p in step.network.parameters() if p.grad is not None]
            left = gradients, step.running_statistics.sums
            found.append([[tensor.double() for tensor in tensors] for tensors in left])
    return max(_apart(*pair) for pair in zip(*found, strict=True))


@contextmanager
def _other_weights(network: nn.Module) -> Iterator[None]:
    """Within: all weights are a little larger, those too that begin at 0."""
    weights: list[Tensor] = list(network.parameters())
    own = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        torch._foreach_add_(weights, 0.01)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, own)


def _apart(plain: Sequence[Tensor], replayed: Sequence[Tensor]) -> float:
    """The greatest of |a - b| / |a|; infinite where only one of two numbers is finite."""
    both = list(zip(plain, replayed, strict=True))
    if not all(torch.equal(a.isfinite(), b.isfinite()) for a, b in both):
        return math.inf
    pairs = [
        [torch.nan_to_num(t, 0.0, 0.0, 0.0) for t in pair]  # float16 overflows in both
        for pair in both
    ]
    everything = math.sqrt(sum(float(a.norm()) ** 2 for a, _ in pairs))
    # one that is all rounding is held against all of them
    least = max(TOLERANCE * everything, torch.finfo(torch.float64).tiny)
    return max((float((a - b).norm()) / max(float(a.norm()), least) for a, b in pairs), default=0.0)


def _step_ms(step: Step, sizes: Sequence[int]) -> tuple[float, float]:
    """Passes of a whole step with their sum over the ranks, plain and replayed: the best of a few
    that alternate, in milliseconds."""
    pixels = {images: _pixels(step, images, 0) for images in set(sizes)}

    def ms(replays: bool) -> float:
        step.graphed.replays = replays
        start_s = time.perf_counter()
        for number, images in enumerate(sizes, 1):
            step.dry_pass(pixels[images], local=number < len(sizes))
        if step.device.type == "cuda":
            torch.cuda.synchronize(step.device)
        seconds = time.perf_counter() - start_s
        step.forget_dry_passes()
        return 1000 * seconds

    pairs = [(ms(False), ms(True)) for _ in range(REPEATS + 2)][2:]  # DDP makes its buckets anew
    plain, replayed = zip(*pairs, strict=True)
    return min(plain), min(replayed)


def _return_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _pixels(step: Step, images: int, seed: int) -> Tensor:
    return random_pixels(images, step.config.data.crop, step.device, seed)
