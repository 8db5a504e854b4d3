"""What a rank loads (the feed), what a loader gives, and which loader to take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from harness.config.schema import Config
from harness.data.index import Index
from harness.data.sampling import Crops, Resizes, crops, permutation, resizes
from harness.errors import UserError
from harness.recipe.minibatch import Minibatch

EVALUATION_BATCH = 256  # images
DRAWN_AT_ONCE = 8192  # images whose windows are drawn together: 0.17 µs an image, 17 µs for 32 each


class BadImageError(UserError):
    """An image that cannot be decoded; the message names its path."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Images as they come from a loader: pixels are normalised on the device.

    `images` uint8 (B, 3, crop, crop), in memory as (B, crop, crop, 3); `labels` and `ids` int64
    (B,), those of the pixels in it; `replaced`: (bad id, id of the image in its place).
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    replaced: list[tuple[int, int]]

    def pin_memory(self) -> Batch:
        """A copy in pinned memory, from which a GPU reads without waiting."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class Feed:
    """What a rank's loader is to produce: a pure function of its arguments.

    `share` is (workers of this rank) / k; `micro_batches` the workers of each of its micro-batches.
    After `crop_epochs` the crops of the first epoch come again; the order of the images does not.

    Place w*n + i of a step is worker w's image i, and image place p of step s is the image at
    s*kn + p of the epoch's permutation. The last N mod kn of a permutation are not used.
    """

    def __init__(
        self,
        config: Config,
        train: Index,
        val: Index,
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

    def use_micro_batch(self, images: int) -> None:
        """Sets the images of a micro-batch, at most all of the rank, for training from then on."""
        minibatch, local_workers = self.minibatch, round(self.share * self.config.workers)
        self.micro_batch = minibatch.micro_batch_images(local_workers, images)
        ranks = self._rank, self._world_size
        self.micro_batches = minibatch.micro_batches(*ranks, self.micro_batch)
        self._places = [minibatch.places(w, self._channels_last) for w in self.micro_batches]
        self.sizes = [len(places) for places in self._places]  # images of each micro-batch

    def training(self, first_step: int) -> Iterator[Crops]:
        """Micro-batch after micro-batch, from the global step `first_step` to the run's last."""
        config, train = self.config, self.train
        places = np.concatenate(self._places)  # of a step: its micro-batches, one after another
        steps_at_once = max(DRAWN_AT_ONCE // len(places), 1)
        first_epoch, step_of_epoch = divmod(first_step, config.steps_per_epoch)
        following = self._executor.submit(self._permutation, first_epoch)
        for epoch in range(first_epoch, config.recipe.epochs):
            order = following.result()
            following = self._executor.submit(self._permutation, epoch + 1)  # made ahead
            for first in range(step_of_epoch, config.steps_per_epoch, steps_at_once):
                steps = range(first, min(first + steps_at_once, config.steps_per_epoch))
                ids = np.concatenate([self._step_of_epoch(order, step)[places] for step in steps])
                sizes_of = train.heights[ids], train.widths[ids]
                windows = crops(config.seed, epoch % self._crop_epochs, ids, *sizes_of, config.data)
                ends = np.cumsum(self.sizes * len(steps)).tolist()
                for start, end in zip([0, *ends], ends, strict=False):
                    yield windows.part(start, end)
            step_of_epoch = 0

    def evaluation(self) -> Iterator[Resizes]:
        """This rank's contiguous share of the validation images, every image once over all ranks.

        Shares differ by at most one image, so a rank may have none.
        """
        images, val = len(self.val), self.val
        end = images * (self._rank + 1) // self._world_size
        for start in range(images * self._rank // self._world_size, end, EVALUATION_BATCH):
            ids = np.arange(start, min(start + EVALUATION_BATCH, end))
            yield resizes(ids, val.heights[ids], val.widths[ids], self.config.data)

    def step_ids(self, step: int) -> NDArray[np.int64]:
        """All kn image ids of a global step, by place."""
        epoch, step_of_epoch = divmod(step, self.config.steps_per_epoch)
        return self._step_of_epoch(self._permutation(epoch), step_of_epoch)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return permutation(self.config.seed, epoch, len(self.train))

    def _step_of_epoch(self, order: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        size = self.config.recipe.minibatch
        return order[step * size : (step + 1) * size]


class Loader(Protocol):
    """Carries out a feed. Batches come in the feed's order, whatever the number of threads.

    Raises BadImageError (always in evaluation; in training with data.on_bad_image: fail) and
    UserError for files that changed since they were indexed.
    """

    name: str

    def train(self, first_step: int) -> Iterator[Batch]:
        """This rank's micro-batches from the global step `first_step` to the run's end."""
        ...

    def evaluate(self) -> Iterator[Batch]:
        """This rank's validation images; may be asked for while training goes on."""
        ...

    def close(self) -> None:
        """Ends all threads and processes of the loader; may be called twice."""
        ...


def resolve_loader(name: str, rank: int) -> str:
    """`run.loader` with "auto" replaced: "dali" where it can be imported, else "reference".

    What is missing is said once, by rank 0. Raises UserError where "dali" was asked for by name.
    """
    if name not in ("auto", "dali") or not (missing := _missing_dali()):
        return "dali" if name == "auto" else name
    if name == "dali":
        raise UserError(f"run.loader: {missing}; or set run.loader=auto")
    if rank == 0:
        print(f"run.loader: {missing}; the reference loader is taken", flush=True)
    return "reference"


def _missing_dali() -> str:
    """Why DALI cannot be used and what to do; empty where it can."""
    try:
        import harness.data.dali  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: a library of its that does not load
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("nvidia")
        why = "is not installed" if absent else f"cannot be imported ({str(error).splitlines()[0]})"
        return f"DALI {why}: pip install -e '.[dali]' (CUDA 12: '.[dali-cuda12]')"
    return ""


def resolve_threads(threads: int | Literal["auto"], local_ranks: int) -> int:
    """`run.loader_threads` with "auto" replaced: the cores of this machine, shared by its ranks."""
    return max(len(os.sched_getaffinity(0)) // local_ranks, 1) if threads == "auto" else threads


def open_loader(
    config: Config, feed: Feed, name: str, threads: int, device_is_cuda: bool
) -> Loader:
    """The loader `name` ("dali", "reference" or "memory") for `feed`; close it after use.

    `threads`: worker processes of "reference" (0 loads in this process), threads of "dali".
    """
    from harness.data.memory import MemoryLoader
    from harness.data.reference import ReferenceLoader

    if name == "memory":
        return MemoryLoader(config, feed, device_is_cuda)
    if name == "dali":
        from harness.data.dali import DaliLoader

        return DaliLoader(config, feed, threads, device_is_cuda)
    return ReferenceLoader(config, feed, threads, device_is_cuda)
