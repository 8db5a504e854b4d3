"""Single image files from anywhere, in any format that can be imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from harness.data.prepare.png import as_png
from harness.data.sources.header import size_of
from harness.data.sources.image_format import IMPORTED, image_format
from harness.data.sources.source import ImageSource


@dataclass(frozen=True, eq=False, kw_only=True)
class FileSource(ImageSource):
    """The images `files`; nothing is kept of them on the disk. WebP and the like become PNG."""

    files: tuple[Path, ...]

    def read(self, image_id: int) -> bytes:
        """Return the content of the image's file, as a PNG where the loaders cannot decode it."""
        file = self.files[image_id]
        return as_png(file) if image_format(file) in IMPORTED else file.read_bytes()

    def name(self, image_id: int) -> str:
        """Return the path of the image's file."""
        return str(self.files[image_id])

    def relative_path(self, image_id: int) -> str:
        """Return the path from `location`, or the whole path of a file elsewhere."""
        file = self.files[image_id]
        return str(file.relative_to(self.location) if self.location in file.parents else file)


def open_files(
    location: Path, files: Sequence[Path], classes: tuple[str, ...], labels: NDArray[np.int64]
) -> FileSource:
    """Read the headers of `files`, whose `labels` (N,) are positions in `classes`.

    Raises UserError for a file that cannot be read.
    """
    sizes = np.array([_size(file) for file in files], dtype=np.int32).reshape(len(files), 2)
    names = np.array([os.fsencode(file) for file in files], dtype=np.bytes_)
    widths, heights = sizes.T.copy()
    columns = (location, classes, names, labels, widths, heights)
    return FileSource(*columns, files=tuple(files))


def _size(file: Path) -> tuple[int, int]:
    if image_format(file) not in IMPORTED:
        return size_of(file)
    try:
        with Image.open(file, formats=IMPORTED) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return (0, 0)
