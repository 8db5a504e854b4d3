"""DALI's graphs for training and evaluation, and which of their results can be trusted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Generic

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.tensors import TensorListCPU, TensorListGPU
from torch import Tensor
from torch.nn import functional

from harness.data.sampling import EvalBatchSpec, Spec, TrainBatchSpec
from harness.data.sources.source import ImageSource
from harness.errors import UserError

# The share of the images that a GPU's JPEG engine, where there is one, decodes if it can: all. With
# less, an image's decoder, and so its pixels, would depend on the batch that contains it.
HARDWARE_LOAD = 1.0
DEVICE_PADDING, HOST_PADDING = (
    16 * 2**20,
    8 * 2**20,
)  # bytes per thread; more where an image needs it

JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
PNG_START, PNG_DEPTH_AT = b"\x89PNG\r\n\x1a\n", 24
HEAD = PNG_DEPTH_AT + 1  # bytes


NO_IMAGE = np.zeros(1, dtype=np.uint8)  # DALI refuses it, so that the reference renderer reads it


class Task(ABC, Generic[Spec]):
    """The graph of a pipeline that makes `size` x `size` pixels of each image of `source`."""

    dtype: list[types.DALIDataType]  # of the inputs besides the files
    ndim: list[int]

    def __init__(self, source: ImageSource, size: int, threads: int, cuda: bool) -> None:
        self.source, self.size, self.threads, self.cuda = source, size, threads, cuda
        self._has_paths = source.paths(np.arange(0)) is not None
        self._pool = ThreadPoolExecutor(threads, "dali")

    @abstractmethod
    def inputs(self, spec: Spec) -> tuple[NDArray, ...]:
        """Return the inputs of the graph besides the files, each (B, …)."""

    @abstractmethod
    def images(
        self, files: DataNode, size: DataNode, inputs: list[DataNode], decoder: dict
    ) -> DataNode:
        """Build the graph from encoded bytes to uint8 images; `size`: height and width of each."""

    def batch(self, spec: Spec, images: TensorListCPU | TensorListGPU) -> Tensor:
        """Return the graph's images as (B, 3, size, size)."""
        # DALI's own memory, which DALI does not use again while this tensor exists
        batch = torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
        # on a GPU PyTorch's memory, because only that respects PyTorch's streams
        return batch.clone() if self.cuda else batch

    def close(self) -> None:
        """End its threads."""
        self._pool.shutdown()

    def files(self, ids: NDArray[np.int64]) -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
        """Return the paths of the images, (B, bytes) with trailing zeros, or else their contents.

        DALI reads files by itself. Contents are read here, by several threads.
        """
        if (paths := self.source.paths(ids)) is not None:
            return paths.view(np.uint8).reshape(len(paths), -1)
        return list(self._pool.map(self._content, ids.tolist()))

    def _content(self, image_id: int) -> NDArray[np.uint8]:
        try:
            return np.frombuffer(self.source.read(image_id) or bytes(1), np.uint8)
        except (OSError, UserError):  # the renderer raises it again when it is this image's turn
            return NO_IMAGE

    def graph(self, files: DataNode, *inputs: DataNode) -> tuple[DataNode, ...]:
        """Build the graph: images, and what `trusted` has to know about the files."""
        decoder: dict[str, object] = {
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
        if self._has_paths:
            files = fn.io.file.read(files)
        # as stored, not as RGB: a CMYK image has 4 channels
        shape = fn.peek_image_shape(
            files, dtype=types.INT32, adjust_orientation=False, image_type=types.ANY_DATA
        )
        ends: dict[str, object] = {"axes": [0], "out_of_bounds_policy": "pad"}
        return (
            self.images(files, shape[:2], list(inputs), decoder),
            fn.slice(files, 0, HEAD, **ends),
            fn.slice(files, files.shape(dtype=types.INT32) - len(JPEG_END), len(JPEG_END), **ends),
            shape,
        )

    def trusted(
        self, spec: Spec, head: NDArray[np.uint8], tail: NDArray[np.uint8], shape: NDArray
    ) -> NDArray[np.bool_]:
        """Return which images, (B,), are whole JPEGs other than CMYK, or PNGs of at most 8 bits.

        Images of another size than recorded are not trusted either. DALI decodes a truncated JPEG
        where the window lies above the cut, 16-bit PNGs with another rounding, CMYK without
        Adobe's marker as the negative of PIL's result, and other formats; the reference loader
        does none of this.
        """
        whole_jpeg = _equals(head, JPEG_START) & _equals(tail, JPEG_END) & (shape[:, 2] != 4)
        png = _equals(head, PNG_START) & (head[:, PNG_DEPTH_AT] <= 8)
        heights, widths = self.source.heights[spec.ids], self.source.widths[spec.ids]
        return (whole_jpeg | png) & (shape[:, 0] == heights) & (shape[:, 1] == widths)


class Windows(Task[TrainBatchSpec]):
    """Training: decode a window, resize it, flip it."""

    dtype, ndim = [types.INT32, types.INT32, types.INT32], [1, 1, 0]

    def inputs(self, spec: TrainBatchSpec) -> tuple[NDArray, ...]:
        corners = np.stack([spec.top, spec.left], 1)
        return corners, np.stack([spec.height, spec.width], 1), spec.flip.astype(np.int32)

    def images(
        self, files: DataNode, size: DataNode, inputs: list[DataNode], decoder: dict
    ) -> DataNode:
        corner, shape, flip = inputs
        images = _window(files, size, corner, shape, decoder)
        return fn.flip(fn.resize(images, size=[self.size, self.size]), horizontal=flip)


class Squares(Task[EvalBatchSpec]):
    """Evaluation: decode only the part of the image from which the resized square is made."""

    dtype, ndim = [types.INT32, types.INT32, types.FLOAT, types.FLOAT], [1, 1, 1, 1]

    def inputs(self, spec: EvalBatchSpec) -> tuple[NDArray, ...]:
        """Return the window to decode, and where within it the square begins and ends."""
        sizes = np.stack([self.source.heights[spec.ids], self.source.widths[spec.ids]], 1)
        scale = sizes / np.stack([spec.resized_height, spec.resized_width], 1)
        start = np.stack([spec.top, spec.left], 1) * scale
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


class OnCpu(Task[Spec]):
    """DALI decodes; PyTorch resizes, faster than DALI and as PIL does, in threads of its own."""

    @abstractmethod
    def pixels(self, spec: Spec, place: int, image: Tensor) -> NDArray[np.uint8]:
        """Return what becomes of the image at `place`: (height, width, 3) -> (size, size, 3)."""

    def batch(self, spec: Spec, images: TensorListCPU | TensorListGPU) -> Tensor:
        """Return the images as (B, 3, size, size)."""
        batch = np.empty((len(spec.ids), self.size, self.size, 3), dtype=np.uint8)

        def fill(place: int) -> None:
            batch[place] = self.pixels(spec, place, torch.from_dlpack(images[place]))

        list(self._pool.map(fill, range(len(batch))))
        return torch.from_numpy(batch).permute(0, 3, 1, 2)


class WindowsOnCpu(OnCpu[TrainBatchSpec], Windows):
    """Training: DALI decodes a window; PyTorch resizes it and flips it."""

    dtype, ndim = [types.INT32, types.INT32], [1, 1]

    def inputs(self, spec: TrainBatchSpec) -> tuple[NDArray, ...]:
        return super().inputs(spec)[:2]

    def images(
        self, files: DataNode, size: DataNode, inputs: list[DataNode], decoder: dict
    ) -> DataNode:
        corner, shape = inputs
        return _window(files, size, corner, shape, decoder)

    def pixels(self, spec: TrainBatchSpec, place: int, image: Tensor) -> NDArray[np.uint8]:
        resized = _resized(image, self.size, self.size)
        # by numpy: PyTorch would copy with threads of its own
        return resized[:, ::-1] if spec.flip[place] else resized


class SquaresOnCpu(OnCpu[EvalBatchSpec]):
    """Evaluation: DALI decodes the image; PyTorch resizes it, and the square is cut out."""

    dtype, ndim = [], []

    def inputs(self, spec: EvalBatchSpec) -> tuple[NDArray, ...]:
        return ()

    def images(
        self, files: DataNode, size: DataNode, inputs: list[DataNode], decoder: dict
    ) -> DataNode:
        return _window(files, size, 0 * size, size, decoder)

    def pixels(self, spec: EvalBatchSpec, place: int, image: Tensor) -> NDArray[np.uint8]:
        height, width = int(spec.resized_height[place]), int(spec.resized_width[place])
        top, left = int(spec.top[place]), int(spec.left[place])
        return _resized(image, height, width)[top : top + self.size, left : left + self.size]


def _window(
    files: DataNode, size: DataNode, corner: DataNode, shape: DataNode, decoder: dict
) -> DataNode:
    """Decode a window of each file, after the `size` of all of them was read.

    A header that the decoder cannot read makes it crash the process now and then (a segmentation
    fault in DALI 2.4.0), because it does not wait for its threads; reading the sizes first raises.
    """
    return fn.decoders.image_slice(files, corner + 0 * size, shape, axes=[0, 1], **decoder)


def _resized(image: Tensor, height: int, width: int) -> NDArray[np.uint8]:
    """Resize uint8 (H, W, 3) to (height, width, 3): bilinear, antialiased, rounded as by PIL."""
    planes = image.permute(2, 0, 1)[None]
    resized = functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _equals(rows: NDArray[np.uint8], text: bytes) -> NDArray[np.bool_]:
    """Return which of `rows` (B, bytes) begin with `text`: (B,)."""
    return (rows[:, : len(text)] == np.frombuffer(text, np.uint8)).all(1)
