"""Pixels and images of other formats, encoded as PNG files."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from harness.data.bad_image import BadImageError
from harness.data.sources.image_format import IMPORTED

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def png_bytes(pixels: np.ndarray) -> bytes:
    """Encode uint8 (H, W) or (H, W, 3) as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def as_png(file: Path) -> bytes:
    """Return the first frame as a PNG with the same pixels, without applying EXIF orientation.

    CMYK and other modes that PNG lacks become RGB. Raises BadImageError if it cannot be decoded.
    """
    stream = io.BytesIO()
    try:
        with Image.open(file, formats=IMPORTED) as image:
            if image.mode in ("F", "I"):
                raise ValueError(f"32-bit pixels (mode {image.mode})")
            if image.mode.startswith("I;16"):
                image.convert("I").convert("I;16").save(stream, "PNG")
            else:
                plain = image if image.mode in PNG_MODES else image.convert("RGB")
                plain.save(stream, "PNG", icc_profile=None, save_all=False)
    except MemoryError:
        raise
    except Exception as error:  # PIL raises many kinds of errors for broken files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadImageError(f"{file}: cannot be decoded: {reason}; repair or remove it") from None
    return stream.getvalue()
