"""The shared memory by which worker processes hand over their batches."""

from __future__ import annotations

import os

from harness.distributed import world_from_environment
from harness.errors import UserError

FOLDER = "/dev/shm"
PREFETCHED = 2  # batches that DataLoader has each worker process prepare


def check_shared_memory(batches_bytes: int, workers: int, folder: str = FOLDER) -> None:
    """Raise UserError where the batches of all local ranks' workers do not fit into /dev/shm.

    `batches_bytes` is the size of a training batch and an evaluation batch. A worker that finds no
    room would drop its batch, and training would wait for it until the hang time-out.
    """
    ranks = world_from_environment("cpu").local_world_size
    needed = PREFETCHED * workers * batches_bytes * ranks
    try:
        space = os.statvfs(folder)
    except OSError:  # no such folder: PyTorch uses another way
        return
    free = space.f_bavail * space.f_frsize
    if free < needed:
        raise UserError(
            f"{folder}: {free / 1e6:.0f} MB are free, and {workers} worker processes in each of "
            f"{ranks} local ranks need {needed / 1e6:.0f} MB: give a container more (docker run "
            f"--shm-size={round(needed * 1.25 / 1e6) + 64}m), or set run.loader_threads=0"
        )
