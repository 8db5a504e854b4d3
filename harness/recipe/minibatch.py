"""A minibatch: k workers of n images, distributed over ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from harness.errors import UserError

if TYPE_CHECKING:
    from harness.config.schema import Config

AUTO_MICRO_BATCH = 256  # images, if a rank has that many


@dataclass(frozen=True)
class Minibatch:
    """The kn images of a step. Workers are logical: k and n do not depend on the hardware.

    Worker w's image i has place w*n + i within the minibatch, from 0 to kn - 1. Ranks host whole
    units of `unit_workers` workers, whose passes have the same shape wherever they run.
    """

    workers: int  # k
    worker_batch: int  # n, "a hyper-parameter of BN, not of distributed training" (section 2.3)
    unit_workers: int = 1

    @classmethod
    def of(cls, config: Config) -> Minibatch:
        """Return the minibatch of a config."""
        return cls(config.workers, config.recipe.worker_batch, config.run.unit_workers)

    @property
    def size(self) -> int:
        """kn, in images (section 2.1)."""
        return self.workers * self.worker_batch

    @property
    def units(self) -> int:
        """The number of units of a step."""
        return self.workers // self.unit_workers

    @property
    def unit_images(self) -> int:
        """The images of a unit."""
        return self.unit_workers * self.worker_batch

    def workers_of(self, rank: int, world_size: int) -> range:
        """Return the workers of a rank: contiguous, with shares that differ by at most one unit.

        Raises UserError for more ranks than units.
        """
        if world_size > self.units:
            units = f", {self.units} units of {self.unit_workers}" * (self.unit_workers > 1)
            raise UserError(
                f"{world_size} ranks, but recipe.minibatch / recipe.worker_batch = {self.size} / "
                f"{self.worker_batch} is only {self.workers} workers{units}: start at most "
                f"{self.units}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, {world_size})")
        share, surplus = divmod(self.units, world_size)
        first = rank * share + min(rank, surplus)
        end = first + share + (rank < surplus)
        return range(first * self.unit_workers, end * self.unit_workers)

    def micro_batches(self, rank: int, world_size: int, micro_batch: int) -> list[range]:
        """Return the workers of each of a rank's micro-batches of `micro_batch` images, in order.

        The last may be smaller. Accumulating over them is a legal way to run the recipe
        (footnote 5). Raises ValueError unless `micro_batch` is a multiple of n.
        """
        per_micro_batch, rest = divmod(micro_batch, self.worker_batch)
        if rest or per_micro_batch < 1:
            raise ValueError(f"micro_batch {micro_batch} is not a multiple of {self.worker_batch}")
        hosted = self.workers_of(rank, world_size)
        starts = range(0, len(hosted), per_micro_batch)
        return [hosted[start : start + per_micro_batch] for start in starts]

    def micro_batch_images(self, local_workers: int, micro_batch: int | Literal["auto"]) -> int:
        """Return how many images a rank of `local_workers` workers processes in one pass.

        `micro_batch` is `run.micro_batch`; "auto" takes the workers of 256 images.
        """
        images = AUTO_MICRO_BATCH if micro_batch == "auto" else micro_batch
        fitting = max(images // self.worker_batch, 1)
        return min(local_workers, fitting) * self.worker_batch

    def places(self, workers: range, channels_last: bool) -> np.ndarray:
        """Return the places (m*n,) int64 of a micro-batch of m workers, in memory order.

        The order is worker by worker in channels_last. In NCHW, image i of the j-th worker is at
        i*m + j, so `GhostBatchNorm2d` needs no copy of the images.
        """
        images = np.arange(self.worker_batch, dtype=np.int64)
        places = np.asarray(workers, dtype=np.int64)[:, None] * self.worker_batch + images
        return (places if channels_last else places.T).reshape(-1)
