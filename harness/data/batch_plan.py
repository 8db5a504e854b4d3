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
DRAWN_AT_ONCE = 8192  # images whose windows are drawn together: 0.17 µs an image, 17 µs for 32 each


class BatchPlan:
    """The images, windows and flips of a rank, in order: a pure function of the arguments.

    `share` is (workers of this rank) / k; `micro_batches` holds the workers of each micro-batch.
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
        self.minibatch = Minibatch(config.workers, config.recipe.worker_batch)
        self.share = len(self.minibatch.workers_of(rank, world_size)) / config.workers
        self.use_micro_batch(micro_batch)
        self._executor = ThreadPoolExecutor(1, "permutation")

    def with_val_images(self, images: int) -> BatchPlan:
        """Return this plan for the first `images` validation images only."""
        data = self.config.data.model_copy(update={"val_images": images})
        config, val = self.config.model_copy(update={"data": data}), self.val.first(images)
        layout = self._rank, self._world_size, self.micro_batch, self._channels_last
        return BatchPlan(config, self.train, val, *layout, self._crop_epochs)

    def use_micro_batch(self, images: int) -> None:
        """Set the images of a micro-batch, at most all of the rank's, for training from here on."""
        minibatch, local_workers = self.minibatch, round(self.share * self.config.workers)
        self.micro_batch = minibatch.micro_batch_images(local_workers, images)
        ranks = self._rank, self._world_size
        self.micro_batches = minibatch.micro_batches(*ranks, self.micro_batch)
        self._places = [minibatch.places(w, self._channels_last) for w in self.micro_batches]
        self.sizes = [len(places) for places in self._places]  # images of each micro-batch

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

        Shares differ by at most one image, so a rank may have none.
        """
        images, val = len(self.val), self.val
        end = images * (self._rank + 1) // self._world_size
        for start in range(images * self._rank // self._world_size, end, EVALUATION_BATCH):
            ids = np.arange(start, min(start + EVALUATION_BATCH, end))
            yield resizes(ids, val.heights[ids], val.widths[ids], self.config.data)

    def step_ids(self, step: int) -> NDArray[np.int64]:
        """Return all kn image ids of a global step, by place."""
        epoch, step_of_epoch = divmod(step, self.config.steps_per_epoch)
        return self._step_of_epoch(self._permutation(epoch), step_of_epoch)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return permutation(self.config.seed, epoch, len(self.train))

    def _step_of_epoch(self, order: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        size = self.config.recipe.minibatch
        return order[step * size : (step + 1) * size]
