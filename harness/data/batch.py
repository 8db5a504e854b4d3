"""What a loader gives, and what is asked of a loader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from harness.errors import UserError


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
