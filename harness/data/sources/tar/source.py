"""Images in tar archives: the data format "tar"."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness.data.sources.index_places import lock_first, user_cache_place
from harness.data.sources.partial import PartialResults
from harness.data.sources.source import ImageSource
from harness.data.sources.tar.find import find_archives
from harness.data.sources.tar.index import Ignored, TarIndex, build_index, read_index, write_index
from harness.data.sources.tar.labels import devkit_of, labelled_split
from harness.data.sources.tar.members import BLOCK
from harness.data.sources.tar.prefetch import BackgroundReader
from harness.data.sources.tar.reader import Archive, ArchiveReader, ChangedArchive
from harness.data.sources.tar.scan import Record, scan
from harness.data.sources.tar.striping import warn_of_one_stripe
from harness.errors import UserError
from harness.recipe.losses import UNLABELLED


@dataclass(frozen=True, eq=False, kw_only=True)
class TarSource(ImageSource):
    """Images in archives, each read by its position: see TarIndex for the arrays."""

    files: tuple[Archive, ...]
    archives: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    headers: NDArray[np.uint32]
    ignored: Ignored

    def read(self, image_id: int) -> bytes:
        """Return the image's bytes, which may have been read ahead."""
        return self._background.take(image_id)

    def prefetch(self, image_ids: NDArray[np.int64]) -> None:
        """Begin to read images in threads."""
        self._background.start(image_ids.tolist())

    def name(self, image_id: int) -> str:
        """Return archive, class, name and offset."""
        label, name = self.labels[image_id], os.fsdecode(bytes(self.names[image_id]))
        path = name if label == UNLABELLED else f"{self.classes[label]}/{name}"
        archive = self.files[self.archives[image_id]].path
        return f"{archive}: {path} at offset {self.offsets[image_id]}"

    def _read_now(self, image_id: int) -> bytes:
        """Read an image together with the header before it, which shows that it is the image."""
        size = BLOCK + int(self.sizes[image_id])
        start = int(self.offsets[image_id]) - BLOCK
        content = self._reader.read(int(self.archives[image_id]), start, size)
        if zlib.crc32(content[:BLOCK]) != self.headers[image_id]:
            raise ChangedArchive("the archive has changed since it was indexed")
        return content[BLOCK:]

    @cached_property
    def _reader(self) -> ArchiveReader:
        return ArchiveReader(self.files)

    @cached_property
    def _background(self) -> BackgroundReader:
        return BackgroundReader(self._read_now)


def open_tar(data_root: str | Path, split: str) -> TarSource:
    """Return the images of a split in the archives of data_root, as `find_archives` finds them.

    The index is kept in the user's cache folder and renewed when an archive has changed. One
    process builds it, others wait; one that was interrupted continues. Raises UserError for
    missing, damaged and hostile archives, and as `labelled_split`.
    """
    root = Path(data_root)
    archives = [Archive.at(path) for path in find_archives(root, split)]
    paths = [str(archive.path) for archive in archives]
    location = Path(paths[0] if len(paths) == 1 else f"{os.path.commonprefix(paths)}*")  # noqa: RUF071
    places = [user_cache_place(root / split, ".tar.npz")]
    files = [*archives, *_at([devkit_of(archives)])]
    if index := read_index(places[0], files):
        return _source(location, index, places[0])
    with lock_first(places) as cache:
        index = read_index(cache, files) if cache else None
        return _source(location, index or _build(location, archives, files, split, cache), cache)


def _build(
    location: Path,
    archives: list[Archive],
    files: list[Archive],
    split: str,
    cache: Path | None,
) -> TarIndex:
    warn_of_one_stripe(archives)
    partial = PartialResults[Record](cache and cache.with_suffix(".partial"), "listing")
    labelled = labelled_split(archives, scan(archives, location, partial), split)
    if not labelled.images:
        raise UserError(f"{location}: no images (.jpg, .jpeg, .png) in it; add some")
    index = build_index(files, labelled, location)
    if cache is not None:
        write_index(cache, index)
    partial.remove()
    return index


def _at(paths: Iterable[Path]) -> list[Archive]:
    return [Archive.at(path) for path in paths if path.is_file()]


def _source(location: Path, index: TarIndex, cache: Path | None) -> TarSource:
    columns = index.names, index.labels, index.widths, index.heights
    return TarSource(
        location,
        index.classes,
        *columns,
        kept_digests=index.digests,
        cache=cache,
        files=index.files,
        archives=index.archives,
        offsets=index.offsets,
        sizes=index.sizes,
        headers=index.headers,
        ignored=index.ignored,
    )
