"""Carries the sampling out by DALI, on CPU or GPU; the only importer of nvidia.dali.

DALI reads, decodes, resizes, crops and flips as it is told, and draws nothing itself; on a CPU
PyTorch resizes the training windows, which takes a third of DALI's time. A file that DALI cannot
decode, or that is no whole 8-bit JPEG or PNG, goes to the reference renderer: the same files are
refused, and the same images take their places, as with the reference loader. docs/dali.md says
what was measured.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import fields, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from torch import Tensor
from torch.nn import functional

from harness.config import Config
from harness.data.ahead import Ahead
from harness.data.index import Index
from harness.data.loader import EVALUATION_BATCH, Batch, Feed
from harness.data.reference import Renderer, file_renderer
from harness.data.sampling import Crops, Resizes

DEPTH = 2  # batches in the making
# What the JPEG engine of a GPU, where there is one, takes of the images that it can decode: all.
# With less an image's decoder, and so its pixels, would depend on the batch that it comes in.
HARDWARE_LOAD = 1.0
DEVICE_PADDING, HOST_PADDING = 16 * 2**20, 8 * 2**20  # bytes a thread; more where an image needs it

JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
PNG_START, PNG_DEPTH_AT = b"\x89PNG\r\n\x1a\n", 24
HEAD = PNG_DEPTH_AT + 1  # bytes


class _Task(ABC):
    """What a pipeline does with the images of `index`: makes `size` x `size` pixels of each."""

    dtype: list[Any]  # of the inputs, besides the paths
    ndim: list[int]

    def __init__(self, index: Index, size: int, threads: int, cuda: bool) -> None:
        self.index, self.size, self.threads, self.cuda = index, size, threads, cuda
        folders = [os.fsencode(folder) + b"/" for folder in index.folders]
        self._folders = np.array(folders)

    @abstractmethod
    def inputs(self, request: Any) -> tuple[NDArray, ...]:
        """What the graph is told besides the paths, each (B, …)."""

    @abstractmethod
    def images(self, files: DataNode, inputs: list[DataNode], decoder: dict) -> DataNode:
        """The graph from the files' bytes to uint8 images (size, size, 3)."""

    def batch(self, request: Any, images: Any) -> Tensor:
        """What the graph gave as (B, 3, size, size)."""
        # DALI's own memory: DALI does not use it again before this tensor is gone
        batch = torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
        # PyTorch's memory on a GPU, as only that knows of PyTorch's streams
        return batch.clone() if self.cuda else batch

    def paths(self, request: Any) -> NDArray[np.uint8]:
        """(B, bytes), zeros behind the shorter ones."""
        names = self._folders[self.index.labels[request.ids]]
        paths = np.char.add(names, self.index.names[request.ids])
        return paths.view(np.uint8).reshape(len(paths), -1)

    def graph(self, paths: DataNode, *inputs: DataNode) -> tuple[DataNode, ...]:
        """Images, and what `trusted` wants to know of the files."""
        decoder: dict[str, Any] = {
            "device": "mixed" if self.cuda else "cpu",
            "adjust_orientation": False,
        }
        if self.cuda:
            decoder |= {
                "hw_decoder_load": HARDWARE_LOAD,
                "jpeg_fancy_upsampling": True,  # as libjpeg does
                "device_memory_padding": DEVICE_PADDING,
                "host_memory_padding": HOST_PADDING,
            }
        files = fn.io.file.read(paths)
        ends: dict[str, Any] = {"axes": [0], "out_of_bounds_policy": "pad"}
        return (
            self.images(files, list(inputs), decoder),
            fn.slice(files, 0, HEAD, **ends),
            fn.slice(files, files.shape(dtype=types.INT32) - len(JPEG_END), len(JPEG_END), **ends),
            fn.peek_image_shape(files, adjust_orientation=False),
        )

    def trusted(
        self, request: Any, head: NDArray[np.uint8], tail: NDArray[np.uint8], shape: NDArray
    ) -> NDArray[np.bool_]:
        """(B,): whole 8-bit JPEGs and PNGs of the indexed size.

        DALI decodes a truncated JPEG where the window lies above the cut, 16-bit PNGs with another
        rounding, and other formats, all of which the reference loader does not.
        """
        whole_jpeg = _equals(head, JPEG_START) & _equals(tail, JPEG_END)
        png = _equals(head, PNG_START) & (head[:, PNG_DEPTH_AT] <= 8)
        index, ids = self.index, request.ids
        as_indexed = (shape[:, 0] == index.heights[ids]) & (shape[:, 1] == index.widths[ids])
        return (whole_jpeg | png) & as_indexed


class _Windows(_Task):
    """Training: decodes a window, resizes it, flips it."""

    dtype, ndim = [types.INT32, types.INT32, types.INT32], [1, 1, 0]

    def inputs(self, request: Crops) -> tuple[NDArray, ...]:
        corners = np.stack([request.top, request.left], 1)
        return corners, np.stack([request.height, request.width], 1), request.flip.astype(np.int32)

    def images(self, files: DataNode, inputs: list[DataNode], decoder: dict) -> DataNode:
        corner, shape, flip = inputs
        images = fn.decoders.image_slice(files, corner, shape, axes=[0, 1], **decoder)
        return fn.flip(fn.resize(images, size=[self.size, self.size]), horizontal=flip)


class _WindowsOnCpu(_Windows):
    """Training: DALI decodes a window; PyTorch resizes it, faster and as PIL does, and flips it."""

    dtype, ndim = [types.INT32, types.INT32], [1, 1]

    def __init__(self, index: Index, size: int, threads: int, cuda: bool) -> None:
        super().__init__(index, size, threads, cuda)
        self._threads = ThreadPoolExecutor(threads, "resize")

    def inputs(self, request: Crops) -> tuple[NDArray, ...]:
        return super().inputs(request)[:2]

    def images(self, files: DataNode, inputs: list[DataNode], decoder: dict) -> DataNode:
        return fn.decoders.image_slice(files, *inputs, axes=[0, 1], **decoder)

    def batch(self, request: Crops, images: Any) -> Tensor:
        batch = np.empty((len(request.ids), self.size, self.size, 3), dtype=np.uint8)
        size = self.size, self.size

        def resize(place: int) -> None:
            window = torch.from_dlpack(images[place]).permute(2, 0, 1)[None]
            resized = functional.interpolate(window, size, mode="bilinear", antialias=True)
            pixels = resized[0].permute(1, 2, 0).numpy()
            # by numpy: PyTorch would copy with threads of its own in each of these
            batch[place] = pixels[:, ::-1] if request.flip[place] else pixels

        list(self._threads.map(resize, range(len(batch))))
        return torch.from_numpy(batch).permute(0, 3, 1, 2)

    def close(self) -> None:
        """Ends its threads."""
        self._threads.shutdown()


class _Squares(_Task):
    """Evaluation: the square that is wanted of the resized image, and only what it is made of."""

    dtype, ndim = [types.INT32, types.INT32, types.FLOAT, types.FLOAT], [1, 1, 1, 1]

    def inputs(self, request: Resizes) -> tuple[NDArray, ...]:
        """The window to decode, and where within it the square begins and ends."""
        sizes = np.stack([self.index.heights[request.ids], self.index.widths[request.ids]], 1)
        scale = sizes / np.stack([request.resized_height, request.resized_width], 1)
        start = np.stack([request.top, request.left], 1) * scale
        end = start + self.size * scale
        reach = np.maximum(scale, 1) + 1  # of the antialiasing filter
        first = np.maximum(np.floor(start - reach), 0)
        shape = np.minimum(np.ceil(end + reach), sizes) - first
        pixels, places = np.int32, np.float32
        within = (start - first).astype(places), (end - first).astype(places)
        return first.astype(pixels), shape.astype(pixels), *within

    def images(self, files: DataNode, inputs: list[DataNode], decoder: dict) -> DataNode:
        corner, shape, start, end = inputs
        images = fn.decoders.image_slice(files, corner, shape, axes=[0, 1], **decoder)
        return fn.resize(images, size=[self.size, self.size], roi_start=start, roi_end=end)


class _Run:
    """A DALI pipeline over `requests`, each of at most `max_batch` images.

    Iterates (request, images (B, 3, size, size), trusted (B,)). After a RuntimeError of DALI it is
    invalid; `undone` are the requests that it took and did not answer.
    """

    def __init__(self, task: _Task, requests: Iterator[Any], max_batch: int, depth: int) -> None:
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
        self, task: _Task, renderer: Renderer, requests: Iterator[Any], max_batch: int
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

    def __init__(self, config: Config, feed: Feed, threads: int, device_is_cuda: bool) -> None:
        how = config.data.crop, max(threads, 1), device_is_cuda
        self._feed, self._renderer = feed, file_renderer(config, feed)
        windows = _Windows if device_is_cuda else _WindowsOnCpu
        self._windows, self._squares = windows(feed.train, *how), _Squares(feed.val, *how)
        self._training, self._evaluation = ExitStack(), ExitStack()  # what is open

    def train(self, first_step: int) -> Iterator[Batch]:
        self._training.close()
        requests, images = self._feed.training(first_step), self._feed.micro_batch
        batches: Any = _Batches(self._windows, self._renderer, requests, images)
        self._training.enter_context(closing(batches))
        if isinstance(self._windows, _WindowsOnCpu):  # resized while others are trained on
            batches = self._training.enter_context(closing(Ahead(batches, pin=False)))
        return batches

    def evaluate(self) -> Iterator[Batch]:
        self._evaluation.close()
        requests = self._feed.evaluation()
        batches = _Batches(self._squares, self._renderer, requests, EVALUATION_BATCH)
        return self._evaluation.enter_context(closing(batches))

    def close(self) -> None:
        self._training.close()
        self._evaluation.close()
        if isinstance(self._windows, _WindowsOnCpu):
            self._windows.close()


def _part(request: Any, place: int) -> Any:
    """The request for the one image at `place`."""
    arrays = {f.name: getattr(request, f.name) for f in fields(request)}
    one = {name: x[place : place + 1] for name, x in arrays.items() if isinstance(x, np.ndarray)}
    return replace(request, **one)


def _equals(rows: NDArray[np.uint8], text: bytes) -> NDArray[np.bool_]:
    """(B,): which of `rows` (B, bytes) begin with `text`."""
    return (rows[:, : len(text)] == np.frombuffer(text, np.uint8)).all(1)
