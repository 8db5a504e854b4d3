"""The batch plan: which images, windows and flips a rank needs, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from harness.config.schema import Config
from harness.data.sampling import EvalBatchSpec, TrainBatchSpec, crops, part, permutation, resizes
from harness.data.sources.source import ImageSource
from harness.recipe.minibatch import Minibatch

EVALUATION_BATCH = 256  # images
EXACT_EVALUATION_BATCH = 64  # images; smaller, as ranks share whole batches
DRAWN_AT_ONCE = 8192  # images whose windows are drawn together: 0.17 µs an image, 17 µs for 32 each


class BatchPlan:
    """The images, windows and flips of a rank, in order: a pure function of the arguments.

    `local_workers` is the number of this rank's workers; `micro_batches` holds those of each
    micro-batch.
    After `crop_epochs` the crops of the first epoch are repeated; the order of the images is not.

    Place w*n + i of a step is worker w's image i, and the image at place p of step s is at s*kn + p
    of the epoch's permutation. The last N mod kn of a permutation are not used.
    """

    def __init__(
        self,
        config: Config,
        train: ImageSource,
        val: ImageSource,
        rank: int,
        world_size: int,
        micro_batch: int,
        channels_last: bool,
        crop_epochs: int | None = None,
    ) -> None:
        self.config, self.train, self.val = config, train, val
        self._crop_epochs = crop_epochs or config.recipe.epochs
        self._rank, self._world_size = rank, world_size
        self._channels_last = channels_last
        self.minibatch = Minibatch.of(config)
        self.local_workers = len(self.minibatch.workers_of(rank, world_size))
        self._use_micro_batch(micro_batch)
        self._executor = ThreadPoolExecutor(1, "permutation")

    def with_val_images(self, images: int) -> BatchPlan:
        """Return this plan for the first `images` validation images only."""
        data = self.config.data.model_copy(update={"val_images": images})
        config, val = self.config.model_copy(update={"data": data}), self.val.first(images)
        layout = self._rank, self._world_size, self.micro_batch, self._channels_last
        return BatchPlan(config, self.train, val, *layout, self._crop_epochs)

    def settle(self, config: Config) -> Config:
        """Take over what was measured for `run`: the micro-batch, and how sums are made.

        Returns the config with the micro-batch of this rank, which has no more than its workers.
        """
        self._use_micro_batch(int(config.run.micro_batch))
        run = config.run.model_copy(update={"micro_batch": self.micro_batch})
        self.config = config.model_copy(update={"run": run})
        return self.config

    def _use_micro_batch(self, images: int) -> None:
        """Set the images of a micro-batch, at most all of the rank's, for training from here on."""
        minibatch = self.minibatch
        self.micro_batch = minibatch.micro_batch_images(self.local_workers, images)
        ranks = self._rank, self._world_size
        self.micro_batches = minibatch.micro_batches(*ranks, self.micro_batch)
        self._places = [minibatch.places(w, self._channels_last) for w in self.micro_batches]
        self.sizes = [len(places) for places in self._places]  # images of each micro-batch

    @property
    def statistics_share(self) -> float | None:
        """The weight of this rank's running statistics among those of all ranks.

        It is (workers of this rank) / k; None where sums are exact, as all ranks then have the same
        running statistics, of all workers.
        """
        exact = self.config.run.sums == "exact"
        return None if exact else self.local_workers / self.config.workers

    def training(self, first_step: int) -> Iterator[TrainBatchSpec]:
        """Yield the micro-batches from the global step `first_step` to the run's last."""
        config, train = self.config, self.train
        places = np.concatenate(self._places)  # of a step, micro-batch after micro-batch
        steps_at_once = max(DRAWN_AT_ONCE // len(places), 1)
        first_epoch, step_of_epoch = divmod(first_step, config.steps_per_epoch)
        following = self._executor.submit(self._permutation, first_epoch)
        for epoch in range(first_epoch, config.recipe.epochs):
            order = following.result()
            following = self._executor.submit(self._permutation, epoch + 1)  # meanwhile
            for first in range(step_of_epoch, config.steps_per_epoch, steps_at_once):
                steps = range(first, min(first + steps_at_once, config.steps_per_epoch))
                ids = np.concatenate([self._step_of_epoch(order, step)[places] for step in steps])
                sizes_of = train.heights[ids], train.widths[ids]
                windows = crops(config.seed, epoch % self._crop_epochs, ids, *sizes_of, config.data)
                ends = np.cumsum(self.sizes * len(steps)).tolist()
                for start, end in zip([0, *ends], ends, strict=False):
                    yield part(windows, start, end)
            step_of_epoch = 0

    def evaluation(self) -> Iterator[EvalBatchSpec]:
        """Yield this rank's contiguous share of the validation images; the ranks share all of them.

        Shares differ by at most one image, so a rank may have none. Where sums are exact, they
        differ by one batch: an image's logits depend, by rounding, on the size of its batch.
        """
        images, val = len(self.val), self.val
        batch, indivisible = EVALUATION_BATCH, 1
        if self.config.run.sums == "exact":
            batch = indivisible = EXACT_EVALUATION_BATCH
        parts = -(-images // indivisible)
        first, end = (parts * r // self._world_size for r in (self._rank, self._rank + 1))
        last = min(end * indivisible, images)
        for start in range(first * indivisible, last, batch):
            ids = np.arange(start, min(start + batch, last))
            yield resizes(ids, val.heights[ids], val.widths[ids], self.config.data)

    def recalibration(self) -> Iterator[TrainBatchSpec]:
        """Yield this rank's share of the `run.recalibrate_images` images, in micro-batches.

        They are the first images of the first epoch, with its crops, so that all evaluations of a
        run have the same. The ranks share their workers; a rank may have none.
        """
        config, train, n = self.config, self.train, self.config.recipe.worker_batch
        minibatch = Minibatch(config.run.recalibrate_images // n, n)
        end = minibatch.workers * (self._rank + 1) // self._world_size
        order, at_once = self._permutation(0), self.micro_batch // n
        if config.run.sums == "exact":
            at_once = 1  # passes of one shape, however the ranks share them
        for start in range(minibatch.workers * self._rank // self._world_size, end, at_once):
            workers = range(start, min(start + at_once, end))
            ids = order[minibatch.places(workers, self._channels_last)]
            sizes = train.heights[ids], train.widths[ids]
            yield crops(config.seed, 0, ids, *sizes, config.data)

    def step_ids(self, step: int) -> NDArray[np.int64]:
        """Return all kn image ids of a global step, by place."""
        epoch, step_of_epoch = divmod(step, self.config.steps_per_epoch)
        return self._step_of_epoch(self._permutation(epoch), step_of_epoch)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return permutation(self.config.seed, epoch, len(self.train))

    def _step_of_epoch(self, order: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        size = self.config.recipe.minibatch
        return order[step * size : (step + 1) * size]
