"""Data formats by name: folders, tar archives, and those of installed packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np

from harness.config.schema import RunConfig
from harness.data.sources.folder import open_folder
from harness.data.sources.source import ImageSource
from harness.data.sources.tar.find import holds_archives
from harness.data.sources.tar.source import TarSource, open_tar
from harness.data.sources.tar.staging import staged
from harness.errors import UserError
from harness.installed import find

# A package adds a format by an entry point of this group. Its name is that of the format, and its
# object is called with data_root and "train", "val" or "unlabelled".
GROUP = "harness.data_formats"

OpenSplit = Callable[[Path, str], ImageSource]

BUILT_IN: dict[str, OpenSplit] = {"folder": open_folder, "tar": open_tar}


def open_source(run: RunConfig, split: str) -> ImageSource:
    """Return the images of a split ("train", "val", "unlabelled") below `run.data_root`.

    Archives are first copied below `run.stage_to`, where that is set.

    Raises ConfigError for an unknown `run.data_format`, and UserError where there are no such
    images or the format's package does not work.
    """
    open_split, root = data_format(run.data_format), Path(run.data_root)
    if run.data_format == "folder" and not (root / split).is_dir() and holds_archives(root, split):
        raise UserError(f"{root}: holds archives of {split}; set run.data_format=tar")
    try:
        images = open_split(root, split)
    except OSError as error:
        raise UserError(
            f"{error.filename or run.data_root}: {error.strerror or error}; check run.data_root"
        ) from None
    if problem := _problem(images):
        raise UserError(f"run.data_format: {run.data_format}: {split}: {problem}; fix its package")
    if run.stage_to is not None and isinstance(images, TarSource):
        return staged(images, Path(run.stage_to))
    return images


def data_format(name: str) -> OpenSplit:
    """Return the function that opens a split of the format `name`. Raises as `open_source`."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    built_in = ", ".join(BUILT_IN)
    return cast(OpenSplit, find(GROUP, name, "run.data_format", "format", built_in))


def _problem(images: ImageSource) -> str:
    """Return which attribute contradicts the description of ImageSource; empty for none."""
    if not isinstance(images, ImageSource):
        return f"expected an ImageSource, found {type(images).__name__}"
    kinds: dict[str, type[np.generic]]
    kinds = {"names": np.bytes_, "labels": np.int64, "widths": np.int32, "heights": np.int32}
    for name, kind in kinds.items():
        column = getattr(images, name)
        if not isinstance(column, np.ndarray):
            return f"{name}: expected an array, found {type(column).__name__}"
        if column.shape != (len(images),) or not np.issubdtype(column.dtype, kind):
            expected = f"{kind.__name__} ({len(images)},)"
            return f"{name}: expected {expected}, found {column.dtype.name} {column.shape}"
    if len(images) and not -1 <= images.labels.min() <= images.labels.max() < len(images.classes):
        return f"labels: expected -1 to {len(images.classes) - 1}, the positions in classes"
    return ""
