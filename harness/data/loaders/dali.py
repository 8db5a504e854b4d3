"""The DALI loader, on CPU or GPU: its pipelines, and what it does where DALI cannot.

DALI reads, decodes, resizes, crops and flips as the batch plan says, and draws nothing itself; on
a CPU PyTorch resizes, which takes a third of DALI's time and rounds as PIL does. An image that
DALI cannot decode, or decodes to other pixels than PIL, goes to the reference renderer: so the same
images are refused, and the same images take their places, as with the reference loader.
docs/dali.md reports what was measured.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import chain, islice
from typing import Generic

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from harness.compat import is_cuda_error
from harness.config.schema import Config
from harness.data.batch import Batch
from harness.data.batch_plan import EVALUATION_BATCH, BatchPlan
from harness.data.loaders.dali_tasks import Squares, SquaresOnCpu, Task, Windows, WindowsOnCpu
from harness.data.loaders.prefetch import Prefetcher
from harness.data.render import Renderer
from harness.data.sampling import EvalBatchSpec, Spec, TrainBatchSpec, part

DEPTH = 2  # batches in progress
READ_AHEAD = 1  # batches whose images are read meanwhile


class DaliLoader:
    """`threads` C++ threads each for training and evaluation; no other process.

    On a GPU the batches are on the current device, else in this process' memory.
    """

    name = "dali"

    def __init__(
        self, config: Config, batch_plan: BatchPlan, threads: int, device_is_cuda: bool
    ) -> None:
        how = config.data.crop, max(threads, 1), device_is_cuda
        self._batch_plan, self._renderer = batch_plan, Renderer(config, batch_plan)
        self._on_cpu = not device_is_cuda
        windows, squares = (WindowsOnCpu, SquaresOnCpu) if self._on_cpu else (Windows, Squares)
        self._windows: Task[TrainBatchSpec] = windows(batch_plan.train, *how)
        self._squares: Task[EvalBatchSpec] = squares(batch_plan.val, *how)
        self._training, self._evaluation = ExitStack(), ExitStack()  # what is open

    def train(self, first_step: int) -> Iterator[Batch]:
        self._training.close()
        specs, images = self._batch_plan.training(first_step), self._batch_plan.micro_batch
        batches = _Batches(self._windows, self._renderer, specs, images)
        self._training.enter_context(closing(batches))
        if self._on_cpu:  # PyTorch resizes the next batches while the run trains on this one
            return self._training.enter_context(closing(Prefetcher(batches, pin=False)))
        return batches

    def evaluate(self) -> Iterator[Batch]:
        self._evaluation.close()
        specs = self._batch_plan.evaluation()
        batches = _Batches(self._squares, self._renderer, specs, EVALUATION_BATCH)
        return self._evaluation.enter_context(closing(batches))

    def recalibrate(self) -> Iterator[Batch]:
        self._evaluation.close()
        specs, images = self._batch_plan.recalibration(), self._batch_plan.micro_batch
        batches = _Batches(self._windows, self._renderer, specs, images)
        return self._evaluation.enter_context(closing(batches))

    def close(self) -> None:
        self._training.close()
        self._evaluation.close()
        self._windows.close()
        self._squares.close()


class _Batches(Iterator[Batch], Generic[Spec]):
    """The batches of `specs`, in order, DEPTH in progress."""

    def __init__(
        self, task: Task[Spec], renderer: Renderer, specs: Iterator[Spec], max_batch: int
    ) -> None:
        self._task, self._renderer, self._max_batch = task, renderer, max_batch
        self._run = _Run(task, specs, max_batch, DEPTH)

    def __next__(self) -> Batch:
        try:
            spec, images, trusted = next(self._run)
        except RuntimeError as error:
            if is_cuda_error(error):
                raise
            spec, images, trusted = self._image_by_image()
        batch = Batch(images, self._labels(spec.ids), torch.from_numpy(spec.ids), [])
        return batch if trusted.all() else self._with_rendered(batch, spec, trusted)

    def _image_by_image(self) -> tuple[Spec, Tensor, NDArray[np.bool_]]:
        """Return the spec that failed and what DALI makes of each of its images alone.

        DALI identifies the image that failed only by its place, and more may have failed. After
        an error a pipeline is invalid, so a new one takes over what this one had not answered.
        """
        broken, task = self._run, self._task
        broken.close()
        spec = broken.undone.popleft()
        images, trusted = [], []
        left = deque(part(spec, place, place + 1) for place in range(len(spec.ids)))
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
        self._run = _Run(task, broken.left(), self._max_batch, DEPTH)
        device = "cuda" if task.cuda else "cpu"
        stacked = torch.cat([image.to(device) for image in images])
        return spec, stacked.contiguous(memory_format=torch.channels_last), np.array(trusted)

    def _with_rendered(self, batch: Batch, spec: Spec, trusted: NDArray[np.bool_]) -> Batch:
        """Return `batch` with the reference renderer's images where DALI's are not trusted."""
        images, ids, replaced = batch.images.clone(), batch.ids.clone(), list(batch.replaced)
        for place in np.flatnonzero(~trusted).tolist():
            rendered = self._renderer(part(spec, place, place + 1))
            images[place] = rendered.images[0]
            ids[place] = rendered.ids[0]
            replaced += rendered.replaced
        return Batch(images, self._labels(ids.numpy()), ids, replaced)

    def _labels(self, ids: NDArray[np.int64]) -> Tensor:
        labels = torch.from_numpy(self._task.source.labels[ids])
        return labels.pin_memory() if self._task.cuda else labels

    def close(self) -> None:
        self._run.close()


class _Run(Generic[Spec]):
    """A DALI pipeline over `specs`, each of at most `max_batch` images.

    Iterates (spec, images (B, 3, size, size), trusted (B,)). After a RuntimeError of DALI it is
    invalid; `undone` holds the specs that it took and did not answer.
    """

    def __init__(self, task: Task[Spec], specs: Iterator[Spec], max_batch: int, depth: int) -> None:
        self.undone, self._task = deque[Spec](), task
        self._specs, self._ahead = specs, deque[Spec]()
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

    def __iter__(self) -> Iterator[tuple[Spec, Tensor, NDArray[np.bool_]]]:
        return self

    def __next__(self) -> tuple[Spec, Tensor, NDArray[np.bool_]]:
        if self._pipeline is None:
            raise StopIteration
        self._pipeline.schedule_run()  # the first call schedules as many batches as it is deep
        stream = torch.cuda.current_stream() if self._task.cuda else None
        pixels, *about = self._pipeline.share_outputs(stream)
        spec = self.undone.popleft()
        images = self._task.batch(spec, pixels)
        trusted = self._task.trusted(spec, *(x.as_array() for x in about))
        self._pipeline.release_outputs()
        return spec, images, trusted

    def _inputs(self) -> tuple[NDArray | list[NDArray], ...]:
        spec = self._next_spec()
        self.undone.append(spec)
        return self._task.files(spec.ids), *self._task.inputs(spec)

    def _next_spec(self) -> Spec:
        """Return the next spec; begin to read the images of the one behind it."""
        for spec in islice(self._specs, READ_AHEAD + 1 - len(self._ahead)):
            self._task.source.prefetch(spec.ids)
            self._ahead.append(spec)
        if not self._ahead:
            raise StopIteration
        return self._ahead.popleft()

    def left(self) -> Iterator[Spec]:
        """Return the specs that were not answered."""
        return chain(self.undone, self._ahead, self._specs)

    def close(self) -> None:
        """End its threads, once they have finished their current work."""
        self._pipeline = None
