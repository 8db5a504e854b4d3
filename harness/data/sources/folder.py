"""Images in class folders: the default data format. Scanned once, then listed in a file."""

from __future__ import annotations

import io
import os
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness.atomic_file import write_atomically
from harness.data.sources.digest import UNLABELLED_KEY
from harness.data.sources.header import size_of
from harness.data.sources.index_places import cache_places, lock_first
from harness.data.sources.listing import SUFFIXES, class_folders, first_three, image_names
from harness.data.sources.partial import PartialResults
from harness.data.sources.scan import read_sizes
from harness.data.sources.source import ImageSource
from harness.errors import UserError
from harness.recipe.losses import UNLABELLED

FORMAT_VERSION = 1
# A folder changed less than this before it was listed may change again within one tick of the
# file system's clock, so its time stamp proves nothing (compare git's "racily clean" files).
RACY_NS = 2_000_000_000


class FolderSource(ImageSource):
    """Image files: location/class/name, or location/name for those without a class."""

    def read(self, image_id: int) -> bytes:
        """Return the content of the image's file."""
        return Path(self.name(image_id)).read_bytes()

    def paths(self, image_ids: NDArray[np.int64]) -> NDArray[np.bytes_]:
        """Return the paths of image files, (B,)."""
        return np.char.add(self._folders[self.labels[image_ids]], self.names[image_ids])

    @cached_property
    def _folders(self) -> NDArray[np.bytes_]:
        """By label, with a slash at the end; the last one belongs to the label UNLABELLED (-1)."""
        folders = [*(self.location / name for name in self.classes), self.location]
        return np.array([os.fsencode(folder) + b"/" for folder in folders])


def open_folder(data_root: str | Path, split: str) -> FolderSource:
    """Return the images of data_root/split: class folders, or, for "unlabelled", one flat folder.

    The listing is kept beside the data, or in the user's cache folder where that cannot be
    written, and renewed when classes or the contents of their folders change. One process scans,
    others wait. A scan of many images that was interrupted continues where it stopped.
    Raises UserError for a missing or empty folder and for a class without images.
    """
    folder = Path(data_root) / split
    if split != "unlabelled":
        return _load(folder, class_folders(folder))
    if not folder.is_dir() or not image_names(folder):
        raise UserError(
            f"{folder}: no images ({', '.join(SUFFIXES)}) in it; add some, or set "
            "data.unlabelled_images=0"
        )
    images = _load(folder, {".": folder.stat().st_mtime_ns})  # its only class folder is itself
    (digest,) = images.class_digests().values()
    return replace(
        images,
        classes=(),
        labels=np.full(len(images), UNLABELLED),
        kept_digests={UNLABELLED_KEY: digest},
    )


def _load(folder: Path, changed_ns: dict[str, int]) -> FolderSource:
    places = cache_places(folder)
    for place in places:
        if images := _read_cache(place, folder, changed_ns):
            return images
    with lock_first(places) as cache:
        images = _read_cache(cache, folder, changed_ns) if cache else None
        return images or _scan(folder, changed_ns, cache)


def _scan(folder: Path, changed_ns: dict[str, int], cache: Path | None) -> FolderSource:
    scanned_ns = time.time_ns()
    names = {name: image_names(folder / name) for name in changed_ns}
    if empty := [name for name, found in names.items() if not found]:
        raise UserError(
            f"{folder}: no images ({', '.join(SUFFIXES)}) in class {first_three(empty)}; "
            "add some (those in subfolders do not count) or remove the folder; "
            f"`harness data check {folder.parent}` says what is in it"
        )
    flat = np.array([os.fsencode(name) for found in names.values() for name in found])
    partial = PartialResults[list[list[int]]](cache and cache.with_suffix(".partial"), "sizes")
    sizes = read_sizes(folder, names, changed_ns, partial)
    labels = np.repeat(np.arange(len(names)), [len(found) for found in names.values()])
    widths, heights = sizes.T.copy()
    images = FolderSource(folder, tuple(names), flat, labels, widths, heights, cache=cache)
    if cache is not None:
        _write_cache(cache, images, list(changed_ns.values()), scanned_ns)
    partial.remove()
    return images


def _write_cache(
    place: Path, images: FolderSource, changed_ns: Sequence[int], scanned_ns: int
) -> None:
    """Write atomically. A cache that cannot be written is a warning."""
    content = io.BytesIO()
    np.savez(
        content,
        version=FORMAT_VERSION,
        scanned_ns=scanned_ns,
        changed_ns=np.array(changed_ns, dtype=np.int64),
        classes=np.array([os.fsencode(name) for name in images.classes]),
        digests=np.array(list(images.class_digests().values())),
        names=images.names,
        labels=images.labels.astype(np.int32),
        widths=images.widths,
        heights=images.heights,
    )
    try:
        write_atomically(place, content.getvalue())
    except OSError as error:
        print(f"warning: {place}: not written: {error.strerror}; continuing", file=sys.stderr)


def _read_cache(place: Path, folder: Path, changed_ns: dict[str, int]) -> FolderSource | None:
    """Return the images listed at `place`, or None where that is missing or out of date."""
    try:
        with np.load(place, allow_pickle=False) as file:
            if int(file["version"]) != FORMAT_VERSION:
                return None
            kept = {key: file[key] for key in file.files}
        classes = tuple(os.fsdecode(bytes(name)) for name in kept["classes"])
        if dict(zip(classes, kept["changed_ns"].tolist(), strict=True)) != changed_ns:
            return None
        labels, sizes = kept["labels"].astype(np.int64), (kept["widths"], kept["heights"])
        columns = (folder, classes, kept["names"], labels, *sizes, _kept_digests(kept, classes))
        images = FolderSource(*columns, place)
        scanned_ns = int(kept["scanned_ns"])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    bad = [Path(images.name(i)) for i in np.flatnonzero(images.widths == 0).tolist()]
    if any(not path.exists() or size_of(path) != (0, 0) for path in bad):
        return None  # removed or repaired since
    counts = np.bincount(labels, minlength=len(classes))
    for name, count in zip(classes, counts, strict=True):
        racy = changed_ns[name] > scanned_ns - RACY_NS
        if racy and len(image_names(folder / name)) != count:
            return None
    return images


def _kept_digests(kept: dict[str, NDArray], classes: tuple[str, ...]) -> dict[str, str] | None:
    """Return the digests in a cache's arrays; None where an older harness wrote none."""
    if "digests" not in kept:
        return None
    return dict(zip(classes, kept["digests"].tolist(), strict=True))
