"""Read the header of an image: its size, or why it has none."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from PIL import Image

from harness.errors import UserError

FORMATS = ("JPEG", "PNG")  # recognised by content: ImageNet has a PNG named .JPEG


def size_of(file: Path | IO[bytes]) -> tuple[int, int]:
    """Return width and height in pixels as stored; 0, 0 where there is no JPEG or PNG header.

    Raises UserError where the file cannot be read.
    """
    size, fault = read_header(file)
    if isinstance(fault, OSError) and fault.errno is not None:  # not the image's fault
        raise UserError(f"{file}: cannot be read: {fault.strerror}; check it")
    return size


def read_header(file: Path | IO[bytes]) -> tuple[tuple[int, int], Exception | None]:
    """Return the size, or 0, 0 and why the header cannot be read."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.size, None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return (0, 0), error


def image_fault(error: Exception) -> str:
    """Return what an error of PIL says about an image, in one line."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "neither JPEG nor PNG"
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"it has more than {limit:,} pixels, the most that PIL decodes; make it smaller"
    return (str(error) or type(error).__name__).splitlines()[0]
