"""Which image, which crop, which flip: a pure function of (seed, epoch, image id).

There is no generator and so no state: nothing depends on the number of ranks or threads, or on
where a run resumes. An image's id is its position in the image source.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from harness.config.schema import DataConfig

Ints = NDArray[np.integer]

TRIES = 10  # section 5.1 by [fb]: "area 8-100 %, ratio 3/4-4/3, 10 tries"
DRAWS = 4  # of a try: area, ratio, top, left

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


class Purpose(IntEnum):
    """The use of a hash: equal keys give independent hashes under different purposes."""

    PERMUTATION = 1
    CROP = 2
    FLIP = 3
    REPLACEMENT = 4


@dataclass(frozen=True, eq=False)
class TrainBatchSpec:
    """The images and windows of a micro-batch, each array (B,), in pixels of the stored image.

    int64 `ids`; int32 `top`, `left`, `height`, `width`; bool `flip`. All belong to one `epoch`.
    """

    ids: NDArray[np.int64]
    top: NDArray[np.int32]
    left: NDArray[np.int32]
    height: NDArray[np.int32]
    width: NDArray[np.int32]
    flip: NDArray[np.bool_]
    epoch: int


@dataclass(frozen=True, eq=False)
class EvalBatchSpec:
    """The images of an evaluation batch and what is made of them, each array (B,).

    The whole image is resized to `resized_height` x `resized_width`; then the square of the
    config's `crop` is taken at (`top`, `left`). int64 `ids`, the others int32.
    """

    ids: NDArray[np.int64]
    resized_height: NDArray[np.int32]
    resized_width: NDArray[np.int32]
    top: NDArray[np.int32]
    left: NDArray[np.int32]


BatchSpec = TrainBatchSpec | EvalBatchSpec
Spec = TypeVar("Spec", bound=BatchSpec)


def part(spec: Spec, start: int, end: int) -> Spec:
    """Return the images from place `start` to before `end`."""
    fields: dict = vars(spec)
    arrays = {name: x[start:end] for name, x in fields.items() if isinstance(x, np.ndarray)}
    return type(spec)(**(fields | arrays))


def hash64(purpose: Purpose, *keys: ArrayLike) -> NDArray[np.uint64]:
    """Return a 64-bit hash of non-negative integers, broadcast against each other.

    A chain of splitmix64 generators (Steele et al. 2014): each key picks a number from the stream
    seeded by the hash of the keys before it. With all keys but the last fixed it is one to one.
    """
    state = np.uint64(purpose)
    with np.errstate(over="ignore"):
        for key in keys:
            state = state + (np.asarray(key).astype(np.uint64) + np.uint64(1)) * _GOLDEN
            state = (state ^ (state >> _SHIFT_1)) * _FACTOR_1
            state = (state ^ (state >> _SHIFT_2)) * _FACTOR_2
            state = state ^ (state >> _SHIFT_3)
    return np.asarray(state)


def uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return hashes as numbers in [0, 1), made of their upper 53 bits."""
    return (bits >> np.uint64(11)) * 2.0**-53


def permutation(seed: int, epoch: int, images: int) -> NDArray[np.int64]:
    """Return the order of an epoch: int64 (images,). 0.15 s at 1.28 M images."""
    # no two ids have equal hashes, so every sorting algorithm gives this order
    return np.argsort(hash64(Purpose.PERMUTATION, seed, epoch, np.arange(images)), kind="stable")


def crops(
    seed: int, epoch: int, ids: NDArray[np.int64], heights: Ints, widths: Ints, data: DataConfig
) -> TrainBatchSpec:
    """Return windows and flips of the images `ids`, of `heights` x `widths`, in `epoch`; all (B,).

    As torchvision's RandomResizedCrop.get_params: area uniform, ratio log-uniform, up to 10 tries
    to fit, then the central window of the nearest ratio. An unknown size (0) counts as 1 x 1.
    """
    heights = np.maximum(heights, 1).astype(np.int64)
    widths = np.maximum(widths, 1).astype(np.int64)
    windows = np.stack(_central_windows(heights, widths, data.crop_ratio))
    open_places = np.arange(len(ids))  # where no window fits yet
    for attempt in range(TRIES):
        draws = np.arange(attempt * DRAWS, (attempt + 1) * DRAWS)[:, None]
        bits = hash64(Purpose.CROP, seed, epoch, ids[open_places], draws)
        sizes = heights[open_places], widths[open_places]
        tried, fits = _tried_windows(uniform(bits), *sizes, data)
        windows[:, open_places[fits]] = tried[:, fits]
        open_places = open_places[~fits]
        if not len(open_places):
            break
    flip = hash64(Purpose.FLIP, seed, epoch, ids) >> np.uint64(63) == 1
    top, left, height, width = windows.astype(np.int32)
    return TrainBatchSpec(ids, top, left, height, width, flip & data.flip, epoch)


def _tried_windows(
    draws: NDArray[np.float64], heights: Ints, widths: Ints, data: DataConfig
) -> tuple[Ints, NDArray[np.bool_]]:
    """Return windows (4, B), as top, left, height and width, and whether each fits, (B,)."""
    area, ratio, down, across = draws
    low, high = data.crop_area
    area = (low + (high - low) * area) * (heights * widths)
    low, high = np.log(data.crop_ratio)
    ratio = np.exp(low + (high - low) * ratio)
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width >= 1) & (width <= widths) & (height >= 1) & (height <= heights)
    top, left = np.floor(down * (heights - height + 1)), np.floor(across * (widths - width + 1))
    return np.stack([top, left, height, width]), fits


def _central_windows(
    heights: Ints, widths: Ints, ratios: tuple[float, float]
) -> tuple[Ints, Ints, Ints, Ints]:
    """Return the largest central windows with a ratio within `ratios`: top, left, height, width."""
    low, high = ratios
    tall, wide = widths / heights < low, widths / heights > high
    height = np.where(tall, np.maximum(np.rint(widths / low), 1), heights).astype(np.int64)
    width = np.where(wide, np.maximum(np.rint(heights * high), 1), widths).astype(np.int64)
    return (heights - height) // 2, (widths - width) // 2, height, width


def resizes(ids: NDArray[np.int64], heights: Ints, widths: Ints, data: DataConfig) -> EvalBatchSpec:
    """Resize the short side to `data.resize`, then take the central square of `data.crop`.

    All arrays are (B,). torchvision's Resize truncates the long side; its CenterCrop rounds halves
    to even.
    """
    heights, widths = (
        np.maximum(heights, 1).astype(np.int64),
        np.maximum(widths, 1).astype(np.int64),
    )
    short = np.minimum(heights, widths)
    resized_height = (data.resize * heights / short).astype(np.int32)
    resized_width = (data.resize * widths / short).astype(np.int32)
    top = np.rint((resized_height - data.crop) / 2).astype(np.int32)
    left = np.rint((resized_width - data.crop) / 2).astype(np.int32)
    return EvalBatchSpec(ids, resized_height, resized_width, top, left)
