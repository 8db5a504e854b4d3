"""Render a batch from decoded images, one by one, as torchvision does with PIL images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from harness.config.schema import Config
from harness.data.bad_image import REPLACEMENTS, BadImageError, replacements
from harness.data.batch import Batch
from harness.data.batch_plan import BatchPlan
from harness.data.decode import read_image, render_crop, render_resize
from harness.data.sampling import BatchSpec, TrainBatchSpec, crops
from harness.data.sources.source import ImageSource

GetImage = Callable[[int], Image.Image]  # decodes the image of an id


class Renderer:
    """Renders the batches of a plan.

    `train_image` and `val_image` decode an image by its id: by default they read the plan's
    sources. Raises as `read_image`, but for bad training images with data.on_bad_image: skip,
    whose places other images take.
    """

    def __init__(
        self,
        config: Config,
        batch_plan: BatchPlan,
        train_image: GetImage | None = None,
        val_image: GetImage | None = None,
    ) -> None:
        self._config, self._train, self._val = config, batch_plan.train, batch_plan.val
        self._reads = train_image is None and val_image is None
        self._train_image = train_image or partial(read_image, self._train)
        self._val_image = val_image or partial(read_image, self._val)

    def __call__(self, spec: BatchSpec) -> Batch:
        size = self._config.data.crop
        if self._reads:
            (self._train if isinstance(spec, TrainBatchSpec) else self._val).prefetch(spec.ids)
        pixels = np.empty((len(spec.ids), size, size, 3), dtype=np.uint8)
        if isinstance(spec, TrainBatchSpec):
            return self._training_batch(spec, pixels)
        for place, (image_id, window) in enumerate(_rows(spec, size)):
            pixels[place] = render_resize(self._val_image(image_id), *window)
        return _batch(pixels, self._val, spec.ids, [])

    def _training_batch(self, spec: TrainBatchSpec, pixels: NDArray[np.uint8]) -> Batch:
        size, skip = self._config.data.crop, self._config.data.on_bad_image == "skip"
        ids, replaced = spec.ids.copy(), []
        for place, (image_id, window) in enumerate(_rows(spec, size)):
            try:
                pixels[place] = render_crop(self._train_image(image_id), *window)
            except BadImageError:
                if not skip:
                    raise
                ids[place], pixels[place] = self._replacement(spec.epoch, image_id)
                replaced.append((image_id, int(ids[place])))
        return _batch(pixels, self._train, ids, replaced)

    def _replacement(self, epoch: int, bad_id: int) -> tuple[int, NDArray[np.uint8]]:
        """Return the first replacement that can be decoded: its id, and its own window."""
        train, data, seed = self._train, self._config.data, self._config.seed
        for other in replacements(seed, epoch, bad_id, len(train)):
            try:
                image = self._train_image(other)
            except BadImageError:
                continue
            ids = np.array([other])
            spec = crops(seed, epoch, ids, train.heights[ids], train.widths[ids], data)
            ((_, window),) = _rows(spec, data.crop)
            return other, render_crop(image, *window)
        raise BadImageError(
            f"{train.name(bad_id)}: cannot be decoded, nor can {REPLACEMENTS} images tried in its "
            f"place; check the images of {train.location}"
        )


def _rows(spec: BatchSpec, size: int) -> Iterator[tuple[int, tuple]]:
    """Yield each image's id and the arguments of its render function besides the image."""
    columns: tuple[np.ndarray, ...]
    if isinstance(spec, TrainBatchSpec):
        columns = (spec.top, spec.left, spec.height, spec.width, spec.flip)
    else:
        columns = (spec.resized_height, spec.resized_width, spec.top, spec.left)
    windows = zip(*(column.tolist() for column in columns), repeat(size), strict=False)
    return zip(spec.ids.tolist(), windows, strict=True)


def _batch(
    pixels: NDArray[np.uint8],
    source: ImageSource,
    ids: NDArray[np.int64],
    replaced: list[tuple[int, int]],
) -> Batch:
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    labels = torch.from_numpy(source.labels[ids])
    return Batch(images, labels, torch.from_numpy(ids), replaced)
