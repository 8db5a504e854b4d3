"""Carries the sampling out on images held in memory: small data sets, decoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from PIL import Image
from tqdm import tqdm

from harness.config.schema import Config
from harness.data.batch import BadImageError, Batch
from harness.data.batch_plan import BatchPlan
from harness.data.decode import read_image
from harness.data.loaders.prefetch import Prefetcher
from harness.data.loaders.reference import Renderer
from harness.data.sampling import EvalBatchSpec, TrainBatchSpec
from harness.data.sources.folder import Index


class MemoryLoader:
    """Decodes all images at once, then makes the reference loader's batches, bit by bit.

    A thread keeps a few batches ahead. Raises BadImageError at construction: in training images
    with data.on_bad_image: fail, in validation images always.
    """

    name = "memory"

    def __init__(self, config: Config, feed: BatchPlan, device_is_cuda: bool) -> None:
        self._feed, self._pin = feed, device_is_cuda
        train_image = _decode_all(feed.train, skip=config.data.on_bad_image == "skip")
        val_image = _decode_all(feed.val, skip=False)
        self._renderer = Renderer(config, feed.train, feed.val, train_image, val_image)
        self._training: Prefetcher | None = None
        self._evaluation: Prefetcher | None = None

    def train(self, first_step: int) -> Iterator[Batch]:
        _close(self._training)
        self._training = self._ahead(self._feed.training(first_step))
        return self._training

    def evaluate(self) -> Iterator[Batch]:
        _close(self._evaluation)
        self._evaluation = self._ahead(self._feed.evaluation())
        return self._evaluation

    def close(self) -> None:
        _close(self._training)
        _close(self._evaluation)

    def _ahead(self, requests: Iterator[TrainBatchSpec] | Iterator[EvalBatchSpec]) -> Prefetcher:
        return Prefetcher(map(self._renderer, requests), self._pin)


def _close(ahead: Prefetcher | None) -> None:
    if ahead is not None:
        ahead.close()


def _decode_all(index: Index, skip: bool) -> Callable[[int], Image.Image]:
    """All images of an index, by their id; with `skip`, a bad one raises when it is asked for."""
    images: list[Image.Image | BadImageError] = []
    ids = tqdm(range(len(index)), f"decoding {index.folder}", delay=2, leave=False, disable=None)
    for image_id in ids:
        try:
            # a copy without the file's tables and tags, which take more than small images
            image = read_image(index, image_id).copy()
            image.info.clear()
            images.append(image)
        except BadImageError as error:
            if not skip:
                raise
            images.append(error)

    def image_of(image_id: int) -> Image.Image:
        found = images[image_id]
        if isinstance(found, BadImageError):
            raise found
        return found

    return image_of
