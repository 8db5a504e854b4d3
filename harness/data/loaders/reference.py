"""Carries the sampling out as torchvision does with PIL images, in worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from harness.config.schema import Config
from harness.data.batch import BadImageError, Batch
from harness.data.batch_plan import BatchPlan
from harness.data.decode import read_image, render_crop, render_resize
from harness.data.loaders.child_process import STOP_SIGNALS, settle_child, starting_children
from harness.data.loaders.prefetch import Prefetcher
from harness.data.sampling import EvalBatchSpec, TrainBatchSpec, crops, replacement
from harness.data.sources.folder import Index
from harness.errors import UserError

REPLACEMENTS = 100  # bad images in a row after which the data set is given up


class Renderer:
    """Makes the batch that a feed asks for, from whatever gives the decoded image of an id."""

    def __init__(
        self,
        config: Config,
        train: Index,
        val: Index,
        train_image: Callable[[int], Image.Image],
        val_image: Callable[[int], Image.Image],
    ) -> None:
        self.config, self.train, self.val = config, train, val
        self.train_image, self.val_image = train_image, val_image

    def __call__(self, request: TrainBatchSpec | EvalBatchSpec) -> Batch:
        if isinstance(request, TrainBatchSpec):
            return self._training(request)
        return self._evaluation(request)

    def _training(self, request: TrainBatchSpec) -> Batch:
        size, skip = self.config.data.crop, self.config.data.on_bad_image == "skip"
        pixels = np.empty((len(request.ids), size, size, 3), dtype=np.uint8)
        ids, replaced = request.ids.copy(), []
        for place, (image_id, window) in enumerate(_rows(request, size)):
            try:
                image = self.train_image(image_id)
            except BadImageError:
                if not skip:
                    raise
                ids[place], image, window = self._replacement(request.epoch, image_id)
                replaced.append((image_id, int(ids[place])))
            pixels[place] = render_crop(image, *window)
        return _batch(pixels, self.train, ids, replaced)

    def _replacement(self, epoch: int, bad_id: int) -> tuple[int, Image.Image, Any]:
        """The first image by the hash that can be decoded: id, image, and its own window."""
        seed, train = self.config.seed, self.train
        for attempt in range(REPLACEMENTS):
            image_id = replacement(seed, epoch, bad_id, attempt, len(train))
            try:
                image = self.train_image(image_id)
            except BadImageError:
                continue
            ids = np.array([image_id])
            window = crops(
                seed, epoch, ids, train.heights[ids], train.widths[ids], self.config.data
            )
            return image_id, image, next(_rows(window, self.config.data.crop))[1]
        raise BadImageError(
            f"{train.path(bad_id)}: cannot be decoded, nor can {REPLACEMENTS} images tried in its "
            f"place; check the images of {train.folder}"
        )

    def _evaluation(self, request: EvalBatchSpec) -> Batch:
        size = self.config.data.crop
        pixels = np.empty((len(request.ids), size, size, 3), dtype=np.uint8)
        for place, (image_id, window) in enumerate(_rows(request, size)):
            pixels[place] = render_resize(self.val_image(image_id), *window)
        return _batch(pixels, self.val, request.ids, [])


def file_renderer(config: Config, feed: BatchPlan) -> Renderer:
    """A renderer that reads the files of a feed, one by one as they are asked for."""
    train, val = feed.train, feed.val
    return Renderer(config, train, val, partial(read_image, train), partial(read_image, val))


def _rows(request: TrainBatchSpec | EvalBatchSpec, size: int) -> Iterator[tuple[int, Any]]:
    """Image by image: the id, and what its renderer is told besides the image."""
    window: tuple[np.ndarray, ...]
    if isinstance(request, TrainBatchSpec):
        window = (request.top, request.left, request.height, request.width, request.flip)
    else:
        window = (request.resized_height, request.resized_width, request.top, request.left)
    columns = [column.tolist() for column in window]
    return zip(request.ids.tolist(), zip(*columns, repeat(size)), strict=True)


def _batch(
    pixels: NDArray[np.uint8], index: Index, ids: NDArray[np.int64], replaced: list
) -> Batch:
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    labels = torch.from_numpy(index.labels[ids])
    return Batch(images, labels, torch.from_numpy(ids), replaced)


class _Requests(Sampler):
    """What the worker processes are asked for next: the feed itself."""

    def __init__(self) -> None:
        self.pending: Iterator[TrainBatchSpec | EvalBatchSpec] = iter(())

    def __iter__(self) -> Iterator[TrainBatchSpec | EvalBatchSpec]:
        return self.pending


class _Rendered(Dataset):
    """The batches of a renderer, asked for by their windows."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    def __getitem__(self, request: TrainBatchSpec | EvalBatchSpec) -> Batch | UserError:
        try:
            return self._renderer(request)
        except UserError as error:  # returned, as DataLoader adds a stack to what is raised
            return error


def _unchanged(answer: Any) -> Any:
    return answer


def _settle_worker(parent: int, worker: int) -> None:
    settle_child(parent, STOP_SIGNALS)


class _Workers:
    """A DataLoader whose processes outlive its iterators."""

    def __init__(self, renderer: Renderer, threads: int, pin: bool) -> None:
        self._requests, self._pin = _Requests(), pin
        self._ahead: Prefetcher | None = None
        self._loader: DataLoader = DataLoader(
            _Rendered(renderer),
            batch_size=None,  # a request is a whole batch
            sampler=self._requests,
            collate_fn=_unchanged,
            num_workers=threads,
            persistent_workers=threads > 0,
            worker_init_fn=partial(_settle_worker, os.getpid()),
            multiprocessing_context="fork" if threads else None,
            generator=torch.Generator(),  # leave the global one alone
        )
        with starting_children():
            next(iter(self._loader), None)  # nothing is asked for yet, but the processes start

    def __call__(self, requests: Iterator[TrainBatchSpec | EvalBatchSpec]) -> Iterator[Batch]:
        """The batches of `requests`, in their order; a former iterator must not be used again."""
        self._end_ahead()
        self._requests.pending = requests
        batches = self._received(iter(self._loader))
        if not self._pin:
            return batches
        self._ahead = Prefetcher(batches, pin=True)
        return self._ahead

    def close(self) -> None:
        self._end_ahead()
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            for process in iterator._workers:
                process.kill()  # where one is still busy: SIGTERM does not reach it

    def _end_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    @staticmethod
    def _received(answers: Iterator[Batch | UserError]) -> Iterator[Batch]:
        for answer in answers:
            if isinstance(answer, UserError):
                raise answer
            yield answer


class ReferenceLoader:
    """`threads` worker processes, each making a whole micro-batch at a time; 0: this process.

    The processes are started here, before there is a CUDA context or a process group to inherit.
    Training and evaluation have their own, so that either goes on where it stopped.
    """

    name = "reference"

    def __init__(self, config: Config, feed: BatchPlan, threads: int, device_is_cuda: bool) -> None:
        renderer = file_renderer(config, feed)
        self._feed = feed
        self._training = _Workers(renderer, threads, device_is_cuda)
        self._evaluation = _Workers(renderer, threads, device_is_cuda)

    def train(self, first_step: int) -> Iterator[Batch]:
        return self._training(self._feed.training(first_step))

    def evaluate(self) -> Iterator[Batch]:
        return self._evaluation(self._feed.evaluation())

    def close(self) -> None:
        for workers in (self._training, self._evaluation):
            workers.close()
