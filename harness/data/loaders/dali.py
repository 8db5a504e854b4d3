"""Carries the sampling out by DALI, on CPU or GPU: the pipelines, and what they cannot do.

DALI reads, decodes, resizes, crops and flips as it is told, and draws nothing itself; on a CPU
PyTorch resizes, which takes a third of DALI's time and rounds as PIL does. A file that DALI cannot
decode, or that it decodes to other pixels than PIL, goes to the reference renderer: the same files
are refused, and the same images take their places, as with the reference loader. docs/dali.md
says what was measured.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import fields, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from harness.config.schema import Config
from harness.data.batch import Batch
from harness.data.batch_plan import EVALUATION_BATCH, BatchPlan
from harness.data.loaders.dali_tasks import Squares, SquaresOnCpu, Task, Windows, WindowsOnCpu
from harness.data.loaders.prefetch import Prefetcher
from harness.data.loaders.reference import Renderer, file_renderer

DEPTH = 2  # batches in the making


class _Run:
    """A DALI pipeline over `requests`, each of at most `max_batch` images.

    Iterates (request, images (B, 3, size, size), trusted (B,)). After a RuntimeError of DALI it is
    invalid; `undone` are the requests that it took and did not answer.
    """

    def __init__(self, task: Task, requests: Iterator[Any], max_batch: int, depth: int) -> None:
        self.requests, self.undone = requests, deque[Any]()
        self._task = task
        self._pipeline: Pipeline | None = Pipeline(
            max_batch,
            task.threads,
            torch.cuda.current_device() if task.cuda else None,
            prefetch_queue_depth=depth,
        )
        with self._pipeline:
            dtype, ndim = [types.UINT8, *task.dtype], [1, *task.ndim]
            inputs = fn.external_source(self._inputs, len(dtype), dtype=dtype, ndim=ndim)
            self._pipeline.set_outputs(*task.graph(*inputs))

    def __iter__(self) -> Iterator[tuple[Any, Tensor, NDArray[np.bool_]]]:
        return self

    def __next__(self) -> tuple[Any, Tensor, NDArray[np.bool_]]:
        if self._pipeline is None:
            raise StopIteration
        self._pipeline.schedule_run()  # the first time, as often as it is deep
        stream = torch.cuda.current_stream() if self._task.cuda else None
        pixels, *about = self._pipeline.share_outputs(stream)
        request = self.undone.popleft()
        images = self._task.batch(request, pixels)
        trusted = self._task.trusted(request, *(x.as_array() for x in about))
        self._pipeline.release_outputs()
        return request, images, trusted

    def _inputs(self) -> tuple[NDArray, ...]:
        request = next(self.requests)
        self.undone.append(request)
        return self._task.paths(request), *self._task.inputs(request)

    def close(self) -> None:
        """Ends its threads, once they have done what they are at."""
        self._pipeline = None


class _Batches(Iterator[Batch]):
    """The batches of `requests`, in their order, DEPTH in the making."""

    def __init__(
        self, task: Task, renderer: Renderer, requests: Iterator[Any], max_batch: int
    ) -> None:
        self._task, self._renderer, self._max_batch = task, renderer, max_batch
        self._run = _Run(task, requests, max_batch, DEPTH)

    def __next__(self) -> Batch:
        try:
            request, images, trusted = next(self._run)
        except RuntimeError as error:
            if "CUDA" in str(error):  # no fault of an image
                raise
            request, images, trusted = self._image_by_image()
        batch = Batch(images, self._labels(request.ids), torch.from_numpy(request.ids), [])
        return batch if trusted.all() else self._with_rendered(batch, request, trusted)

    def _image_by_image(self) -> tuple[Any, Tensor, NDArray[np.bool_]]:
        """The next request after an error. DALI says which image failed by its place alone, and
        more may have: each is asked for by itself. Then a new pipeline goes on."""
        broken, task = self._run, self._task
        broken.close()
        request = broken.undone.popleft()
        images, trusted = [], []
        left = deque(_part(request, place) for place in range(len(request.ids)))
        while left:
            run = _Run(task, iter(tuple(left)), 1, 1)
            try:
                for _, image, sound in run:
                    left.popleft()
                    images.append(image)
                    trusted.append(bool(sound[0]))
            except RuntimeError:
                left.popleft()
                images.append(torch.zeros(1, 3, task.size, task.size, dtype=torch.uint8))
                trusted.append(False)
            run.close()
        self._run = _Run(task, chain(broken.undone, broken.requests), self._max_batch, DEPTH)
        device = "cuda" if task.cuda else "cpu"
        stacked = torch.cat([image.to(device) for image in images])
        return request, stacked.contiguous(memory_format=torch.channels_last), np.array(trusted)

    def _with_rendered(self, batch: Batch, request: Any, trusted: NDArray[np.bool_]) -> Batch:
        """`batch`, what is not to be trusted taken from the reference renderer."""
        images, ids, replaced = batch.images.clone(), batch.ids.clone(), list(batch.replaced)
        for place in np.flatnonzero(~trusted).tolist():
            rendered = self._renderer(_part(request, place))
            images[place] = rendered.images[0]
            ids[place] = rendered.ids[0]
            replaced += rendered.replaced
        return Batch(images, self._labels(ids.numpy()), ids, replaced)

    def _labels(self, ids: NDArray[np.int64]) -> Tensor:
        labels = torch.from_numpy(self._task.index.labels[ids])
        return labels.pin_memory() if self._task.cuda else labels

    def close(self) -> None:
        self._run.close()


class DaliLoader:
    """`threads` C++ threads each for training and evaluation; no process besides this one.

    On a GPU the batches are on the current device, else in this process' memory.
    """

    name = "dali"

    def __init__(self, config: Config, feed: BatchPlan, threads: int, device_is_cuda: bool) -> None:
        how = config.data.crop, max(threads, 1), device_is_cuda
        self._feed, self._renderer = feed, file_renderer(config, feed)
        windows, squares = (Windows, Squares) if device_is_cuda else (WindowsOnCpu, SquaresOnCpu)
        self._windows, self._squares = windows(feed.train, *how), squares(feed.val, *how)
        self._training, self._evaluation = ExitStack(), ExitStack()  # what is open

    def train(self, first_step: int) -> Iterator[Batch]:
        self._training.close()
        requests, images = self._feed.training(first_step), self._feed.micro_batch
        batches: Any = _Batches(self._windows, self._renderer, requests, images)
        self._training.enter_context(closing(batches))
        if isinstance(self._windows, WindowsOnCpu):  # resized while others are trained on
            batches = self._training.enter_context(closing(Prefetcher(batches, pin=False)))
        return batches

    def evaluate(self) -> Iterator[Batch]:
        self._evaluation.close()
        requests = self._feed.evaluation()
        batches = _Batches(self._squares, self._renderer, requests, EVALUATION_BATCH)
        return self._evaluation.enter_context(closing(batches))

    def close(self) -> None:
        self._training.close()
        self._evaluation.close()
        self._windows.close()
        self._squares.close()


def _part(request: Any, place: int) -> Any:
    """The request for the one image at `place`."""
    arrays = {f.name: getattr(request, f.name) for f in fields(request)}
    one = {name: x[place : place + 1] for name, x in arrays.items() if isinstance(x, np.ndarray)}
    return replace(request, **one)
