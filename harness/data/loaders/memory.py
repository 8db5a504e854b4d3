"""The memory loader: small data sets, decoded once and held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

from PIL import Image
from tqdm import tqdm

from harness.config.schema import Config
from harness.data.bad_image import BadImageError
from harness.data.batch import Batch
from harness.data.batch_plan import BatchPlan
from harness.data.decode import read_image
from harness.data.loaders.prefetch import Prefetcher
from harness.data.render import GetImage, Renderer
from harness.data.sampling import BatchSpec
from harness.data.sources.source import ImageSource


class MemoryLoader:
    """Decodes all images first, then renders the reference loader's batches, bit for bit.

    A thread keeps a few batches ready. Raises BadImageError at construction: for training images
    with data.on_bad_image: fail, for validation images always.
    """

    name = "memory"

    def __init__(self, config: Config, batch_plan: BatchPlan, device_is_cuda: bool) -> None:
        self._batch_plan, self._pin = batch_plan, device_is_cuda
        train_image = _decode_all(batch_plan.train, skip=config.data.on_bad_image == "skip")
        val_image = _decode_all(batch_plan.val, skip=False)
        self._renderer = Renderer(config, batch_plan, train_image, val_image)
        self._training, self._evaluation = ExitStack(), ExitStack()  # what is open

    def train(self, first_step: int) -> Iterator[Batch]:
        return self._prefetch(self._batch_plan.training(first_step), self._training)

    def evaluate(self) -> Iterator[Batch]:
        return self._prefetch(self._batch_plan.evaluation(), self._evaluation)

    def recalibrate(self) -> Iterator[Batch]:
        return self._prefetch(self._batch_plan.recalibration(), self._evaluation)

    def close(self) -> None:
        self._training.close()
        self._evaluation.close()

    def _prefetch(self, specs: Iterator[BatchSpec], opened: ExitStack) -> Prefetcher:
        opened.close()  # the former iterator
        batches = map(self._renderer, specs)
        return opened.enter_context(closing(Prefetcher(batches, self._pin)))


def _decode_all(source: ImageSource, skip: bool) -> GetImage:
    """Decode all images of a source; return them by id. With `skip`, a bad one raises then."""
    images: list[Image.Image | BadImageError] = []
    label = f"decoding {source.location}"
    for image_id in tqdm(range(len(source)), label, delay=2, leave=False, disable=None):
        try:
            # a copy without the file's tables and tags, which take more memory than small images
            image = read_image(source, image_id).copy()
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
