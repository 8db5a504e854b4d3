"""Around a rank's loader: what it gave is noted, or the run is interrupted at a batch."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from harness.config.schema import Config
from harness.data.batch import Batch, Loader
from harness.data.batch_plan import BatchPlan
from harness.recipe.minibatch import Minibatch


class Interrupting:
    """A loader that sends its own process SIGTERM when the micro-batch number `at` is asked for."""

    def __init__(self, loader: Loader, at: int | None) -> None:
        self.name, self._loader, self._at = loader.name, loader, at

    def train(self, first_step: int) -> Iterator[Batch]:
        for number, batch in enumerate(self._loader.train(first_step)):
            if number == self._at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def evaluate(self) -> Iterator[Batch]:
        return self._loader.evaluate()

    def close(self) -> None:
        self._loader.close()


class Fed:
    """What a rank's loader gave, each image at its place: in the end (steps, kn) over all ranks."""

    def __init__(self, feed: BatchPlan, config: Config, steps: int, channels_last: bool) -> None:
        minibatch = Minibatch(config.workers, config.recipe.worker_batch)
        self._asked = feed.training(0)
        self._places = [minibatch.places(w, channels_last) for w in feed.micro_batches]
        shape = steps, minibatch.size
        # zero at other ranks' places; ids count from 1 here, so that a missing one shows
        self._ids, self._pixels = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self._windows = np.zeros((*shape, 5), np.int64)

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, noted on the way: ids and pixels as given, windows as asked for."""
        for step in range(len(self._ids)):
            for places in self._places:
                batch, asked = next(batches), next(self._asked)
                window = (asked.top, asked.left, asked.height, asked.width, asked.flip)
                self._ids[step, places] += batch.ids.cpu().numpy() + 1
                self._windows[step, places] = np.stack(window, axis=1)
                self._pixels[step, places] = [checksum(image) for image in batch.images.cpu()]
                yield batch

    def over_ranks(self, control: dist.ProcessGroup | None) -> dict[str, Tensor]:
        """ids and pixels (steps, kn), windows (steps, kn, 5): top, left, height, width, flip."""
        return {
            "ids": summed(self._ids, control) - 1,
            "windows": summed(self._windows, control),
            "pixels": summed(self._pixels, control),
        }


def checksum(image: Tensor) -> int:
    """Of the pixels of a uint8 image (3, H, W), which lie in memory as (H, W, 3)."""
    return zlib.crc32(image.permute(1, 2, 0).contiguous().numpy().data)


def summed(local: np.ndarray, control: dist.ProcessGroup | None) -> Tensor:
    """The sum over ranks of an array of whole numbers."""
    total = torch.from_numpy(local)
    if control is not None:
        dist.all_reduce(total, group=control)
    return total
