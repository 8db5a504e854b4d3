"""Wrappers of a rank's loader: one records its images, one interrupts the run at a batch."""

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


class InterruptingLoader:
    """A loader that sends its own process SIGTERM when micro-batch number `at` is requested."""

    def __init__(self, loader: Loader, at: int | None) -> None:
        self.name, self._loader, self._at = loader.name, loader, at

    def train(self, first_step: int) -> Iterator[Batch]:
        for number, batch in enumerate(self._loader.train(first_step)):
            if number == self._at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def evaluate(self) -> Iterator[Batch]:
        return self._loader.evaluate()

    def recalibrate(self) -> Iterator[Batch]:
        return self._loader.recalibrate()

    def close(self) -> None:
        self._loader.close()


class FedImages:
    """The images from the loaders, each at its place: (steps, kn) over all ranks."""

    def __init__(self, plan: BatchPlan, config: Config, steps: int, channels_last: bool) -> None:
        minibatch = Minibatch.of(config)
        self._planned = plan.training(0)
        self._places = [minibatch.places(w, channels_last) for w in plan.micro_batches]
        shape = steps, minibatch.size
        # zero at other ranks' places; ids count from 1 here, so a missing one is noticed
        self._ids, self._pixels = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self._windows = np.zeros((*shape, 5), np.int64)

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches and record ids and pixels as loaded, windows as planned.

        A window is (top, left, height, width, flip).
        """
        for step in range(len(self._ids)):
            for places in self._places:
                batch, spec = next(batches), next(self._planned)
                window = (spec.top, spec.left, spec.height, spec.width, spec.flip)
                self._ids[step, places] += batch.ids.cpu().numpy() + 1
                self._windows[step, places] = np.stack(window, axis=1)
                self._pixels[step, places] = [checksum(image) for image in batch.images.cpu()]
                yield batch

    def over_ranks(self, control: dist.ProcessGroup | None) -> dict[str, Tensor]:
        """Return ids and pixels (steps, kn), and windows (steps, kn, 5) as recorded by `watch`."""
        return {
            "ids": summed(self._ids, control) - 1,
            "windows": summed(self._windows, control),
            "pixels": summed(self._pixels, control),
        }


def checksum(image: Tensor) -> int:
    """Return the CRC of a uint8 image (3, H, W), which is stored as (H, W, 3)."""
    return zlib.crc32(image.permute(1, 2, 0).contiguous().numpy().data)


def summed(local: np.ndarray, control: dist.ProcessGroup | None) -> Tensor:
    """Return the sum over ranks of an integer array."""
    total = torch.from_numpy(local)
    if control is not None:
        dist.all_reduce(total, group=control)
    return total
