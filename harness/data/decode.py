"""Decode an image to RGB with PIL, and render a crop of it as torchvision does."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from harness.data.bad_image import BadImageError
from harness.data.sources.header import FORMATS, image_fault
from harness.data.sources.source import ImageSource
from harness.errors import UserError


def decode(content: bytes, name: str) -> Image.Image:
    """Return an encoded image as RGB, EXIF orientation not applied.

    `name` is for messages. Raises BadImageError for anything but an intact JPEG or PNG.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()
            return to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # PIL raises many kinds for what a broken file contains
        raise BadImageError(f"{name}: cannot be decoded: {image_fault(error)}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Repeat gray, convert CMYK and palettes, drop alpha."""
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
    """Return a training window as uint8 (size, size, 3).

    As torchvision's resized_crop (bilinear, with PIL's antialiasing) and hflip, without their
    checks, which cost more than the work itself when images are small.
    """
    window = image.crop((left, top, left + width, top + height))
    window = window.resize((size, size), Image.Resampling.BILINEAR)
    if flip:
        window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(window)


def render_resize(
    image: Image.Image, resized_height: int, resized_width: int, top: int, left: int, size: int
) -> NDArray[np.uint8]:
    """Return an image for evaluation, uint8 (size, size, 3): as Resize and CenterCrop do."""
    image = image.resize((resized_width, resized_height), Image.Resampling.BILINEAR)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def read_image(source: ImageSource, image_id: int) -> Image.Image:
    """Read and decode an image of a source.

    Raises BadImageError as `decode`, and UserError as `read_encoded` or where the image's size is
    not the one that the source recorded.
    """
    name = source.name(image_id)
    image = decode(read_encoded(source, image_id), name)
    width, height = source.widths[image_id], source.heights[image_id]
    if image.size != (width, height):
        raise UserError(
            f"{name}: {image.width} x {image.height} pixels, {width} x {height} when it was "
            f"indexed; {_stale(source)}"
        )
    return image


def read_encoded(source: ImageSource, image_id: int) -> bytes:
    """Read an image of a source. Raises UserError, which names it, where that fails."""
    name, location = source.name(image_id), source.location
    try:
        return source.read(image_id)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{name}: cannot be read: it was there when {location} was indexed; restore it, or if "
            f"it was removed on purpose, {_stale(source)}"
        ) from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}; check it") from None


def _stale(source: ImageSource) -> str:
    return f"the index is stale: {f'delete {source.cache}' if source.cache else 'start again'}"
