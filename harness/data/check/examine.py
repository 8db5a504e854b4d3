"""A strict check of one image file for damage and oddities."""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torchvision.io import decode_jpeg

from harness.data.check.findings import (
    ALPHA,
    CMYK,
    DAMAGED_INSIDE,
    DEEP,
    GRAY,
    HUGE,
    HUGE_BYTES,
    JPEG_AS_PNG,
    PALETTE,
    PNG_AS_JPEG,
    ROTATED,
    UNDECODABLE,
)
from harness.data.decode import decode
from harness.data.sources.header import FORMATS
from harness.data.sources.image_format import TRAINED_ON, format_of
from harness.errors import UserError

ORIENTATION = 0x0112  # EXIF tag; 1 is upright
# libjpeg's warnings about damaged pixels; its other warnings concern headers
COMPLAINTS = ("Corrupt JPEG data", "Premature end", "Inconsistent progression")
MODES = {"CMYK": CMYK, "L": GRAY, "LA": GRAY, "1": GRAY, "P": PALETTE}


def examine(path: Path, content: bytes) -> Iterator[tuple[str, str]]:
    """Yield the kind and the detail of each finding on an image file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about size and metadata
        try:
            decode(content, str(path))  # exactly as in training
        except UserError as error:
            kind = format_of(content[:16])
            is_other = kind and kind not in TRAINED_ON
            reason = str(error).removeprefix(f"{path}: ").removeprefix(f"{UNDECODABLE}: ")
            yield UNDECODABLE, f"it is {kind}" if is_other else reason
            return
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            yield from _oddities(image, path.suffix.lower(), content)
        if complaint := _complaint(content):
            yield DAMAGED_INSIDE, complaint


def _oddities(image: Image.Image, suffix: str, content: bytes) -> Iterator[tuple[str, str]]:
    """Yield what the header alone shows."""
    decoded_bytes = image.width * image.height * 3
    if decoded_bytes > HUGE_BYTES:
        mebibytes = decoded_bytes / 2**20
        yield HUGE, f"{image.width} x {image.height} pixels, {mebibytes:.0f} MiB as RGB"
    is_png = image.format == "PNG"
    if is_png and suffix != ".png":
        yield PNG_AS_JPEG, ""
    if not is_png and suffix == ".png":
        yield JPEG_AS_PNG, ""
    if image.mode.startswith("I") or (is_png and content[24] == 16):  # the header's bit depth
        yield DEEP, image.mode
    if image.mode in MODES:
        yield MODES[image.mode], ""
    if image.mode in ("LA", "RGBA") or "transparency" in image.info:
        yield ALPHA, ""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # PIL raises many kinds for what broken metadata contains
        return
    if orientation in range(2, 9):
        yield ROTATED, f"orientation {orientation}"


def _complaint(content: bytes) -> str:
    """Return the complaint of a strict decoder about an image that PIL decodes; "" if none."""
    try:
        if not content.startswith(b"\xff\xd8"):
            Image.open(io.BytesIO(content)).verify()  # the checksums of a PNG
            return ""
        with _standard_error() as said:
            decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    except RuntimeError as error:
        return str(error).splitlines()[0].rsplit(": ", 1)[-1]
    except (OSError, SyntaxError) as error:
        return str(error)
    return next((line for line in said if line.startswith(COMPLAINTS)), "")


@contextmanager
def _standard_error() -> Iterator[list[str]]:
    """Capture the lines written to standard error inside the block; the list is filled at its end.

    libjpeg decodes damaged data to wrong pixels. PIL silences its warnings; torchvision lets it
    print them, which is the only evidence.
    """
    lines: list[str] = []
    log, saved = _diversion()
    os.ftruncate(log, 0)
    os.lseek(log, 0, os.SEEK_SET)
    os.dup2(log, 2)
    try:
        yield lines
    finally:
        os.dup2(saved, 2)
        os.lseek(log, 0, os.SEEK_SET)
        lines += os.read(log, 4096).decode(errors="replace").splitlines()


@cache
def _diversion() -> tuple[int, int]:
    """Return descriptors of a temporary file and of this process's standard error."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno()), os.dup(2)
