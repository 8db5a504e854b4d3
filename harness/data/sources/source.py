"""The images of a split, in whatever format they are stored: the seam for data formats."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from harness.data.sources.digest import (
    UNLABELLED_KEY,
    combined_digest,
    digests_by_class,
    positions_by_class,
)
from harness.recipe.losses import UNLABELLED

Source = TypeVar("Source", bound="ImageSource")


@dataclass(frozen=True, eq=False)
class ImageSource(ABC):
    """N encoded images in a fixed order: an image's id is its position.

    location: the file or folder of the split, for messages.
    classes: the names of the classes, in the order of their labels.
    names: bytes (N,), unique within a class. Not necessarily file names.
    labels: int64 (N,), positions in `classes`; UNLABELLED for an image without a class.
    widths, heights: int32 (N,), in pixels as stored (EXIF orientation not applied), 0 where the
        header cannot be read.
    kept_digests: the result of `class_digests`, where it was stored together with the images.
    cache: the file that all this was read from, to be deleted after the images have changed.

    A format is a subclass that implements `read`. docs/data_formats.md has a complete example.
    """

    location: Path
    classes: tuple[str, ...]
    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    kept_digests: Mapping[str, str] | None = None
    cache: Path | None = None

    @abstractmethod
    def read(self, image_id: int) -> bytes:
        """Return the encoded image, a JPEG or a PNG.

        Called in worker processes that are forked from this one and in several threads together,
        so it must not move the position of a file that it shares with another call. Raises OSError
        where the image cannot be read, BadImageError where what is stored is damaged.
        """

    def prefetch(self, image_ids: NDArray[np.int64]) -> None:  # noqa: B027 (optional)
        """Begin to read images (B,) in the background; `read` is called for each of them soon."""

    def paths(self, image_ids: NDArray[np.int64]) -> NDArray[np.bytes_] | None:
        """Return the paths of image files, (B,), or None where images are not files.

        Files are read by DALI's own threads, which saves a copy of each image.
        """
        return None

    def name(self, image_id: int) -> str:
        """Return what messages call an image: by default location/class/name."""
        label = self.labels[image_id]
        folder = self.location if label == UNLABELLED else self.location / self.classes[label]
        return str(folder / os.fsdecode(bytes(self.names[image_id])))

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over classes, names, labels, widths and heights.

        The same for the same data in another folder, in another format or on another machine.
        """
        return combined_digest(self.class_digests())

    def class_digests(self) -> Mapping[str, str]:
        """Return class -> digest of its images (see digests_by_class), unlabelled ones last."""
        return self._computed_digests if self.kept_digests is None else self.kept_digests

    @cached_property
    def _computed_digests(self) -> dict[str, str]:
        return digests_by_class(self.classes, self.names, self.labels, self.widths, self.heights)

    def checksum(self) -> str:
        """Return the SHA-256 by which caches of soft targets identify their images.

        Older than `digest`; it also depends on the width of the array of names.
        """
        total = hashlib.sha256("\n".join(self.classes).encode())
        for array in (self.names, self.labels, self.widths, self.heights):
            total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()

    def sizes_of(self, class_name: str) -> dict[str, tuple[int, int]]:
        """Return name -> (width, height) of the images of a class, or of UNLABELLED_KEY."""
        group = [*self.classes, UNLABELLED_KEY].index(class_name)
        return {
            os.fsdecode(bytes(self.names[i])): (int(self.widths[i]), int(self.heights[i]))
            for i in positions_by_class(self.labels, len(self.classes))[group].tolist()
        }

    def relative_path(self, image_id: int) -> str:
        """Return class/name of an image, unlabelled/name for one without a class."""
        label = self.labels[image_id]
        group = "unlabelled" if label == UNLABELLED else self.classes[label]
        return f"{group}/{os.fsdecode(bytes(self.names[image_id]))}"

    def relabelled(self: Source, classes: Sequence[str]) -> Source:
        """Return the same images, labelled by their place in `classes`, which has all of theirs."""
        labels = np.array([classes.index(name) for name in self.classes], dtype=np.int64)
        return replace(self, classes=tuple(classes), labels=labels[self.labels], kept_digests=None)

    def first(self: Source, images: int) -> Source:
        """Return the first `images` images only, of the same classes."""
        columns = ("names", "labels", "widths", "heights")
        parts = {name: getattr(self, name)[:images] for name in columns}
        return replace(self, kept_digests=None, **parts)


@dataclass(frozen=True, eq=False, kw_only=True)
class JoinedSource(ImageSource):
    """The images of `labelled`, followed by those of `unlabelled`."""

    labelled: ImageSource
    unlabelled: ImageSource

    def read(self, image_id: int) -> bytes:
        """Return the encoded image."""
        source, own_id = self._part(image_id)
        return source.read(own_id)

    def prefetch(self, image_ids: NDArray[np.int64]) -> None:
        """Begin to read the images of both parts."""
        behind = image_ids >= len(self.labelled)
        self.labelled.prefetch(image_ids[~behind])
        self.unlabelled.prefetch(image_ids[behind] - len(self.labelled))

    def paths(self, image_ids: NDArray[np.int64]) -> NDArray[np.bytes_] | None:
        """Return the paths where both parts have them."""
        behind = image_ids >= len(self.labelled)
        own = self.labelled.paths(image_ids[~behind])
        others = self.unlabelled.paths(image_ids[behind] - len(self.labelled))
        if own is None or others is None:
            return None
        paths = np.empty(len(image_ids), np.result_type(own, others))
        paths[~behind], paths[behind] = own, others
        return paths

    def name(self, image_id: int) -> str:
        """Return what the image's own source calls it."""
        source, own_id = self._part(image_id)
        return source.name(own_id)

    def _part(self, image_id: int) -> tuple[ImageSource, int]:
        labelled = len(self.labelled)
        if image_id < labelled:
            return self.labelled, image_id
        return self.unlabelled, image_id - labelled


def join(labelled: ImageSource, unlabelled: ImageSource) -> ImageSource:
    """Return the images of both, those of `unlabelled` without a class."""
    both = [(getattr(labelled, a), getattr(unlabelled, a)) for a in ("names", "widths", "heights")]
    names, widths, heights = map(np.concatenate, both)
    labels = np.concatenate([labelled.labels, np.full(len(unlabelled), UNLABELLED)])
    digests = {**labelled.class_digests(), **unlabelled.class_digests()}
    caches = labelled.cache, unlabelled.cache
    prefix = os.path.commonprefix([*map(str, caches)])  # noqa: RUF071 (of their names, too)
    cache = Path(f"{prefix}*") if all(caches) else None
    columns = (labelled.location, labelled.classes, names, labels, widths, heights, digests, cache)
    return JoinedSource(*columns, labelled=labelled, unlabelled=unlabelled)
