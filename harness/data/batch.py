"""A batch of images, and the loader that produces batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Images as a loader produces them. They are normalised later, on the device.

    images: uint8 (B, 3, crop, crop), laid out in memory as (B, crop, crop, 3).
    labels, ids: int64 (B,), of the images whose pixels these are.
    replaced: pairs of a bad image's id and the id of the image in its place.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    replaced: list[tuple[int, int]]

    def pin_memory(self) -> Batch:
        """Return a copy in pinned memory, which a GPU reads without waiting."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class Loader(Protocol):
    """Carries out a batch plan, in its order, whatever the number of threads.

    Raises BadImageError (always in evaluation; in training with data.on_bad_image: fail), and
    UserError for images that changed after their sizes were recorded.
    """

    name: str

    def train(self, first_step: int) -> Iterator[Batch]:
        """Return this rank's micro-batches from the global step `first_step` to the run's end."""
        ...

    def evaluate(self) -> Iterator[Batch]:
        """Return this rank's validation images. May be called while training continues."""
        ...

    def recalibrate(self) -> Iterator[Batch]:
        """Return this rank's training images for running statistics.

        May be called while training continues, but not during an evaluation.
        """
        ...

    def close(self) -> None:
        """End all threads and processes of the loader. May be called twice."""
        ...
