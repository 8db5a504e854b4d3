"""What DALI is to do with the images of a batch: its graphs for training and evaluation."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode
from torch import Tensor
from torch.nn import functional

from harness.data.sampling import EvalBatchSpec, TrainBatchSpec
from harness.data.sources.folder import Index

# What the JPEG engine of a GPU, where there is one, takes of the images that it can decode: all.
# With less an image's decoder, and so its pixels, would depend on the batch that it comes in.
HARDWARE_LOAD = 1.0
DEVICE_PADDING, HOST_PADDING = 16 * 2**20, 8 * 2**20  # bytes a thread; more where an image needs it

JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
PNG_START, PNG_DEPTH_AT = b"\x89PNG\r\n\x1a\n", 24
HEAD = PNG_DEPTH_AT + 1  # bytes


class Task(ABC):
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
    def images(
        self, files: DataNode, size: DataNode, inputs: list[DataNode], decoder: dict
    ) -> DataNode:
        """The graph from the files' bytes to uint8 images; `size`: height and width of each."""

    def batch(self, request: Any, images: Any) -> Tensor:
        """What the graph gave as (B, 3, size, size)."""
        # DALI's own memory: DALI does not use it again before this tensor is gone
        batch = torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
        # PyTorch's memory on a GPU, as only that knows of PyTorch's streams
        return batch.clone() if self.cuda else batch

    def close(self) -> None:  # noqa: B027 (nothing to end, unless it has threads)
        """Ends its threads, if it has any."""

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
        # of the file, not as RGB: a CMYK image has 4 channels
        shape = fn.peek_image_shape(
            files, dtype=types.INT32, adjust_orientation=False, image_type=types.ANY_DATA
        )
        ends: dict[str, Any] = {"axes": [0], "out_of_bounds_policy": "pad"}
        return (
            self.images(files, shape[:2], list(inputs), decoder),
            fn.slice(files, 0, HEAD, **ends),
            fn.slice(files, files.shape(dtype=types.INT32) - len(JPEG_END), len(JPEG_END), **ends),
            shape,
        )

    def trusted(
        self, request: Any, head: NDArray[np.uint8], tail: NDArray[np.uint8], shape: NDArray
    ) -> NDArray[np.bool_]:
        """(B,): whole 8-bit JPEGs, other than CMYK, and PNGs of the indexed size.

        DALI decodes a truncated JPEG where the window lies above the cut, 16-bit PNGs with another
        rounding, CMYK without Adobe's marker as the negative of what PIL makes of it, and other
        formats, all of which the reference loader does not.
        """
        whole_jpeg = _equals(head, JPEG_START) & _equals(tail, JPEG_END) & (shape[:, 2] != 4)
        png = _equals(head, PNG_START) & (head[:, PNG_DEPTH_AT] <= 8)
        index, ids = self.index, request.ids
        as_indexed = (shape[:, 0] == index.heights[ids]) & (shape[:, 1] == index.widths[ids])
        return (whole_jpeg | png) & as_indexed


class Windows(Task):
    """Training: decodes a window, resizes it, flips it."""

    dtype, ndim = [types.INT32, types.INT32, types.INT32], [1, 1, 0]

    def inputs(self, request: TrainBatchSpec) -> tuple[NDArray, ...]:
        corners = np.stack([request.top, request.left], 1)
        return corners, np.stack([request.height, request.width], 1), request.flip.astype(np.int32)

    def images(
        self, files: DataNode, size: DataNode, inputs: list[DataNode], decoder: dict
    ) -> DataNode:
        corner, shape, flip = inputs
        images = _window(files, size, corner, shape, decoder)
        return fn.flip(fn.resize(images, size=[self.size, self.size]), horizontal=flip)


class Squares(Task):
    """Evaluation: the square that is wanted of the resized image, and only what it is made of."""

    dtype, ndim = [types.INT32, types.INT32, types.FLOAT, types.FLOAT], [1, 1, 1, 1]

    def inputs(self, request: EvalBatchSpec) -> tuple[NDArray, ...]:
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

    def images(
        self, files: DataNode, size: DataNode, inputs: list[DataNode], decoder: dict
    ) -> DataNode:
        corner, shape, start, end = inputs
        images = _window(files, size, corner, shape, decoder)
        return fn.resize(images, size=[self.size, self.size], roi_start=start, roi_end=end)


class OnCpu(Task):
    """DALI decodes; PyTorch resizes, faster than DALI and as PIL does, in threads of its own."""

    def __init__(self, index: Index, size: int, threads: int, cuda: bool) -> None:
        super().__init__(index, size, threads, cuda)
        self._threads = ThreadPoolExecutor(threads, "resize")

    @abstractmethod
    def pixels(self, request: Any, place: int, image: Tensor) -> NDArray[np.uint8]:
        """What the image at `place`, decoded (height, width, 3), becomes: (size, size, 3)."""

    def batch(self, request: Any, images: Any) -> Tensor:
        batch = np.empty((len(request.ids), self.size, self.size, 3), dtype=np.uint8)

        def fill(place: int) -> None:
            batch[place] = self.pixels(request, place, torch.from_dlpack(images[place]))

        list(self._threads.map(fill, range(len(batch))))
        return torch.from_numpy(batch).permute(0, 3, 1, 2)

    def close(self) -> None:
        """Ends its threads."""
        self._threads.shutdown()


class WindowsOnCpu(OnCpu, Windows):
    """Training: DALI decodes a window; PyTorch resizes it and flips it."""

    dtype, ndim = [types.INT32, types.INT32], [1, 1]

    def inputs(self, request: TrainBatchSpec) -> tuple[NDArray, ...]:
        return super().inputs(request)[:2]

    def images(
        self, files: DataNode, size: DataNode, inputs: list[DataNode], decoder: dict
    ) -> DataNode:
        corner, shape = inputs
        return _window(files, size, corner, shape, decoder)

    def pixels(self, request: TrainBatchSpec, place: int, image: Tensor) -> NDArray[np.uint8]:
        resized = _resized(image, self.size, self.size)
        # by numpy: PyTorch would copy with threads of its own
        return resized[:, ::-1] if request.flip[place] else resized


class SquaresOnCpu(OnCpu):
    """Evaluation: DALI decodes the image; PyTorch resizes it, and the square is cut out."""

    dtype, ndim = [], []

    def inputs(self, request: EvalBatchSpec) -> tuple[NDArray, ...]:
        return ()

    def images(
        self, files: DataNode, size: DataNode, inputs: list[DataNode], decoder: dict
    ) -> DataNode:
        return _window(files, size, 0 * size, size, decoder)

    def pixels(self, request: EvalBatchSpec, place: int, image: Tensor) -> NDArray[np.uint8]:
        height, width = int(request.resized_height[place]), int(request.resized_width[place])
        top, left = int(request.top[place]), int(request.left[place])
        return _resized(image, height, width)[top : top + self.size, left : left + self.size]


def _window(
    files: DataNode, size: DataNode, corner: DataNode, shape: DataNode, decoder: dict
) -> DataNode:
    """Decodes a window of each file, once the `size` of all of them could be read.

    A header that the decoder cannot read makes it crash the process, now and then (segmentation
    fault in DALI 2.4.0), as it does not wait for its threads; reading the sizes first raises.
    """
    return fn.decoders.image_slice(files, corner + 0 * size, shape, axes=[0, 1], **decoder)


def _resized(image: Tensor, height: int, width: int) -> NDArray[np.uint8]:
    """uint8 (H, W, 3) -> (height, width, 3), bilinear, antialiased, rounded as by PIL."""
    planes = image.permute(2, 0, 1)[None]
    resized = functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _equals(rows: NDArray[np.uint8], text: bytes) -> NDArray[np.bool_]:
    """(B,): which of `rows` (B, bytes) begin with `text`."""
    return (rows[:, : len(text)] == np.frombuffer(text, np.uint8)).all(1)
