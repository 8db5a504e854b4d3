"""The micro-batch size: how many images a rank pushes through the network together.

With `run.micro_batch: auto`, all ranks run micro-batches of 1, 2, 4, … workers forward and backward
before the first step, uncompiled, and take the smallest size that no larger one beats; compiling
every size would take minutes. The run keeps nothing of it, and the choice changes rounding only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from harness.config.schema import Config
from harness.data.batch_plan import BatchPlan
from harness.distributed import broadcast_from_rank0, max_over_ranks
from harness.execution.compilation import uncompiled
from harness.outcome import RunFailed
from harness.recipe.minibatch import Minibatch
from harness.resilience.watchdog import Phase, Watchdog
from harness.training.replica import Replica

LARGEST = {"cpu": 256, "cuda": 1024}  # images
REPEATS = 3
GAIN = 0.02  # by which a larger micro-batch has to be faster
FREE = 0.15  # of a GPU's memory, for the loader's decoder, evaluation and fragmentation
LONGEST_S = 1.0  # on a CPU; a pass of a large network takes seconds there


def tune_micro_batch(
    replica: Replica,
    batch_plan: BatchPlan,
    recorded: int | None,
    control: dist.ProcessGroup | None,
    watchdog: Watchdog,
) -> Config:
    """Choose the micro-batch size for `batch_plan`; return the config with it in run.micro_batch.

    Rank 0's `recorded` size is kept; where that is None, all ranks measure the fastest one.
    """
    images, origin = broadcast_from_rank0(recorded, control), "as recorded by this run"
    if images is None:
        origin = "measured as the fastest"
        images = fastest_micro_batch(
            replica,
            batch_plan.minibatch,
            replica.world.world_size,
            control,
            lambda tried: watchdog.enter_phase(0, Phase.STARTING, tried),
        )
    run = replica.config.run.model_copy(update={"micro_batch": images})
    config = batch_plan.settle(replica.config.model_copy(update={"run": run}))
    images = batch_plan.micro_batch
    if replica.world.rank == 0:
        print(
            f"micro-batch  {images} images a rank, {origin}; rounding, and with it the error, "
            f"depends on it: repeat with run.micro_batch={images}",
            flush=True,
        )
    return config


def fastest_micro_batch(
    replica: Replica,
    minibatch: Minibatch,
    world_size: int,
    control: dist.ProcessGroup | None,
    before_try: Callable[[int], object],
) -> int:
    """Return the fastest number of images, the same on all ranks; the slowest rank's times count.

    `before_try` is called with each size. A size that does not fit in the memory of some rank is
    not taken. Raises RunFailed where one worker's images do not fit.
    """
    begun_s = time.monotonic()
    best_s, best = math.inf, 0
    for images in candidates(minibatch, world_size, replica.device.type):
        before_try(images)
        with uncompiled(replica.config):
            own_s = seconds_an_image(replica, images), time.monotonic() - begun_s
        image_s, spent_s = max_over_ranks(own_s, control)
        if image_s >= best_s * (1 - GAIN):
            break  # no faster, or it does not fit
        best_s, best = image_s, images
        if replica.device.type == "cpu" and spent_s > LONGEST_S:
            break
    if not best:
        raise RunFailed(
            f"one worker's {minibatch.worker_batch} images do not fit in the memory of a rank's "
            "device with 15 % left free; lower recipe.worker_batch (it changes the curve), or set "
            f"run.micro_batch={minibatch.worker_batch} to try nevertheless"
        )
    return best


def candidates(minibatch: Minibatch, world_size: int, device_type: str) -> list[int]:
    """Return sizes in images: 1, 2, 4, … workers, and the most that a rank may take."""
    n = minibatch.worker_batch
    share = -(-minibatch.workers // world_size)  # the largest
    most = min(share, max(LARGEST[device_type] // n, 1))
    powers = [2**i for i in range(most.bit_length()) if 2**i < most]
    return [workers * n for workers in (*powers, most)]


def seconds_an_image(replica: Replica, images: int) -> float:
    """Time the best of a few forward and backward passes; infinite if they do not fit."""
    cuda = replica.device.type == "cuda"
    seconds = []
    try:
        pixels = random_pixels(images, replica.config.data.crop, replica.device)
        replica.dry_pass(pixels)  # libraries choose their algorithms
        for _ in range(REPEATS):
            start_s = time.perf_counter()
            replica.dry_pass(pixels)
            if cuda:
                torch.cuda.synchronize(replica.device)
            seconds.append(time.perf_counter() - start_s)
        if too_little_memory(replica.device):
            return math.inf
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        replica.forget_dry_passes()
        if cuda:
            torch.cuda.empty_cache()
    return min(seconds) / images


def too_little_memory(device: torch.device) -> bool:
    """Return True where less than 15 % of a GPU's memory is free; a cached block is not."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return free < FREE * total


def random_pixels(images: int, crop: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Draw pixels (images, 3, crop, crop) uint8, in memory as a loader yields them."""
    generator = torch.Generator(device).manual_seed(
        seed
    )  # the run's own generators stay as they are
    shape = images, crop, crop, 3
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    return pixels.permute(0, 3, 1, 2)
