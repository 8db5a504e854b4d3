"""Decode an image file to RGB with PIL, and render a crop of it as torchvision does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from harness.data.batch import BadImageError
from harness.data.sources.folder import Index
from harness.data.sources.scan import FORMATS, image_fault
from harness.errors import UserError


def decode(path: Path) -> Image.Image:
    """The image as RGB, EXIF orientation not applied.

    Raises BadImageError for a file that is no intact JPEG or PNG, UserError where it cannot be
    read (missing, forbidden, a disk error).
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            return to_rgb(image)
    except OSError as error:
        if error.errno is not None:  # no fault of the image
            raise UserError(f"{path}: cannot be read: {error.strerror}; check it") from None
        raise BadImageError(f"{path}: cannot be decoded: {image_fault(error)}") from None
    except MemoryError:
        raise
    except Exception as error:  # PIL raises many kinds for what a broken file contains
        raise BadImageError(f"{path}: cannot be decoded: {image_fault(error)}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Gray is repeated, CMYK and palettes are converted, alpha is dropped."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # 16-bit gray: the upper byte, as PIL does with 16-bit RGB; its own conversion would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without PIL's warning
    return image.convert("RGB")


def render_crop(
    image: Image.Image, top: int, left: int, height: int, width: int, flip: bool, size: int
) -> NDArray[np.uint8]:
    """A training window as uint8 (size, size, 3).

    What torchvision's resized_crop (bilinear, with PIL's antialiasing) and hflip do, without
    their checks, which cost more than the work where images are small.
    """
    window = image.crop((left, top, left + width, top + height))
    window = window.resize((size, size), Image.Resampling.BILINEAR)
    if flip:
        window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(window)


def render_resize(
    image: Image.Image, resized_height: int, resized_width: int, top: int, left: int, size: int
) -> NDArray[np.uint8]:
    """An image for evaluation as uint8 (size, size, 3): torchvision's Resize and CenterCrop."""
    image = image.resize((resized_width, resized_height), Image.Resampling.BILINEAR)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def read_image(index: Index, image_id: int) -> Image.Image:
    """Decodes an image of an index. Raises as `decode`, and UserError where the index is stale."""
    path = index.path(image_id)
    stale = f"the index is stale: {f'delete {index.cache}' if index.cache else 'start again'}"
    try:
        image = decode(path)
    except BadImageError:
        raise
    except UserError:
        if path.exists():
            raise
        raise UserError(
            f"{path}: cannot be read: it was there when its folder was indexed; restore it, or if "
            f"it was removed on purpose, {stale}"
        ) from None
    expected = (index.widths[image_id], index.heights[image_id])
    if image.size != expected:
        raise UserError(
            f"{path}: {image.width} x {image.height} pixels, {expected[0]} x {expected[1]} when it "
            f"was indexed; {stale}"
        )
    return image
