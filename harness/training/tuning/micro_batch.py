"""run.micro_batch: auto: the images that a rank pushes at once, chosen by a short measurement.

Before the first step all ranks push micro-batches of 1, 2, 4, … workers through the model and
back, uncompiled, and take the smallest that no larger one beats: compiling every size would take
minutes. Nothing of it stays in the run; the choice changes rounding only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from harness.distributed import max_over_ranks
from harness.errors import RunFailed
from harness.execution.compilation import uncompiled
from harness.recipe.minibatch import Minibatch
from harness.training.step import Step

LARGEST = {"cpu": 256, "cuda": 1024}  # images
REPEATS = 3
GAIN = 0.02  # by which a larger micro-batch has to be faster
FREE = 0.15  # of a GPU's memory, for the loader's decoder, evaluation and fragmentation
LONGEST_S = 1.0  # on a CPU; a pass of a large network takes seconds there


def fastest_micro_batch(
    step: Step,
    minibatch: Minibatch,
    world_size: int,
    control: dist.ProcessGroup | None,
    tries: Callable[[int], object],
) -> int:
    """The images of a micro-batch, the same on all ranks; the slowest rank's times count.

    `tries` is called with each size before its passes.
    A size that does not fit in a rank's memory is found out here and not taken. Raises RunFailed
    where one worker's images do not fit.
    """
    begun_s = time.monotonic()
    best_s, best = math.inf, 0
    for images in candidates(minibatch, world_size, step.device.type):
        tries(images)
        with uncompiled(step.config):
            own_s = seconds_an_image(step, images), time.monotonic() - begun_s
        image_s, spent_s = max_over_ranks(own_s, control)
        if image_s >= best_s * (1 - GAIN):
            break  # no faster, or it does not fit
        best_s, best = image_s, images
        if step.device.type == "cpu" and spent_s > LONGEST_S:
            break
    if not best:
        raise RunFailed(
            f"one worker's {minibatch.worker_batch} images do not fit in the memory of a rank's "
            "device with 15 % left free; lower recipe.worker_batch (it changes the curve), or set "
            f"run.micro_batch={minibatch.worker_batch} to try nevertheless"
        )
    return best


def candidates(minibatch: Minibatch, world_size: int, device_type: str) -> list[int]:
    """Images: 1, 2, 4, … workers, and the most that a rank may push at once."""
    n = minibatch.worker_batch
    share = -(-minibatch.workers // world_size)  # the largest
    most = min(share, max(LARGEST[device_type] // n, 1))
    powers = [2**i for i in range(most.bit_length()) if 2**i < most]
    return [workers * n for workers in (*powers, most)]


def seconds_an_image(step: Step, images: int) -> float:
    """The best of a few forward and backward passes on this rank; infinite if they do not fit."""
    cuda = step.device.type == "cuda"
    seconds = []
    try:
        pixels = random_pixels(images, step.config.data.crop, step.device)
        step.dry_pass(pixels)  # chooses algorithms
        for _ in range(REPEATS):
            start_s = time.perf_counter()
            step.dry_pass(pixels)
            if cuda:
                torch.cuda.synchronize(step.device)
            seconds.append(time.perf_counter() - start_s)
        if too_little_memory(step.device):
            return math.inf
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        step.forget_dry_passes()
        if cuda:
            torch.cuda.empty_cache()
    return min(seconds) / images


def too_little_memory(device: torch.device) -> bool:
    """Whether less than 15 % of a GPU's memory is free, with what PyTorch keeps for later."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return free < FREE * total


def random_pixels(images: int, crop: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """(images, 3, crop, crop) uint8, in memory as a loader gives them."""
    generator = torch.Generator(device).manual_seed(seed)  # no other numbers of the run move
    shape = images, crop, crop, 3
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    return pixels.permute(0, 3, 1, 2)
