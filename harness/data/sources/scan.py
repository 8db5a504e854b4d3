"""Widths and heights of a folder's images, read from their headers by all cores.

A scan that was interrupted, even killed, goes on where it was: see `read_sizes`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from harness.data.loaders.child_process import worker_processes
from harness.errors import UserError

FORMATS = ("JPEG", "PNG")  # sniffed from the content: ImageNet has a PNG named .JPEG
CHUNK = 200  # headers that one process reads at a time
PARALLEL_FROM = 20_000  # images; below, starting processes takes longer than reading

Sizes = NDArray[np.int32]


@dataclass(frozen=True)
class _Chunk:
    """Some images of a class folder, and when that folder was last changed."""

    folder: Path
    names: Sequence[str]
    changed_ns: int

    def key(self) -> str:
        """What its sizes are kept under; another one once the folder has changed."""
        text = "\0".join([self.folder.name, str(self.changed_ns), *self.names])
        return hashlib.sha256(os.fsencode(text)).hexdigest()


def read_sizes(
    folder: Path, names: dict[str, list[str]], changed_ns: dict[str, int], partial: Path | None
) -> Sizes:
    """Widths and heights, int32 (N, 2), of the images of each class; 0, 0 without a header.

    changed_ns: class -> time of the last change of its folder. Meanwhile `partial`, if any, keeps
    what was read; a later call reads the rest only, and what has changed. Remove it at the end.
    Raises UserError for a file that cannot be read.
    """
    chunks = [
        _Chunk(folder / name, found[start : start + CHUNK], changed_ns[name])
        for name, found in names.items()
        for start in range(0, len(found), CHUNK)
    ]
    images = sum(map(len, names.values()))
    if images < PARALLEL_FROM:
        return np.concatenate([_sizes(chunk) for chunk in chunks])
    kept = _kept(partial)
    keys = [chunk.key() for chunk in chunks]
    sizes = {place: kept[key] for place, key in enumerate(keys) if key in kept}
    missing = [place for place in range(len(chunks)) if place not in sizes]
    # twice as many processes as cores: part of the time goes by waiting for the disk
    with (
        worker_processes(2 * len(os.sched_getaffinity(0))) as workers,
        tqdm(total=images, desc=f"index of {folder}", unit=" images", disable=None) as bar,
    ):
        bar.update(sum(map(len, sizes.values())))
        parts = workers.map(_sizes, [chunks[place] for place in missing])
        for place, part in zip(missing, parts, strict=True):
            sizes[place] = part
            _keep(partial, keys[place], part)
            bar.update(len(part))
    return np.concatenate([sizes[place] for place in range(len(chunks))])


def _sizes(chunk: _Chunk) -> Sizes:
    return np.array([size_of(chunk.folder / name) for name in chunk.names], dtype=np.int32)


def size_of(path: Path) -> tuple[int, int]:
    """Width and height in pixels as stored; 0, 0 where there is no JPEG or PNG header."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except OSError as error:
        if error.errno is not None:  # no fault of the image
            raise UserError(f"{path}: cannot be read: {error.strerror}; check it") from None
        return 0, 0
    except (SyntaxError, ValueError, Image.DecompressionBombError):
        return 0, 0


def header_fault(path: Path) -> str:
    """Why an image's header cannot be read; empty where it can."""
    try:
        with Image.open(path, formats=FORMATS):
            return ""
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return image_fault(error)


def image_fault(error: Exception) -> str:
    """What PIL's error says of an image, in one line."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "neither JPEG nor PNG"
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"it has more than {limit:,} pixels, the most that PIL decodes; make it smaller"
    return (str(error) or type(error).__name__).splitlines()[0]


def _keep(partial: Path | None, key: str, sizes: Sizes) -> None:
    """Appends a line. One that a kill has torn spoils no other: each begins with a line's end."""
    if partial is None or not sizes.all():  # a bad image may be mended until the scan goes on
        return
    line = json.dumps({"key": key, "sizes": sizes.tolist()})
    with suppress(OSError), open(partial, "a") as stream:  # the scan matters more than its trace
        stream.write(f"\n{line}\n")


def _kept(partial: Path | None) -> dict[str, Sizes]:
    """Key -> sizes of the whole lines; empty where there is no file."""
    kept: dict[str, Sizes] = {}
    with suppress(OSError):
        for line in partial.read_bytes().splitlines() if partial else []:
            with suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                kept[record["key"]] = np.array(record["sizes"], dtype=np.int32)
    return kept
