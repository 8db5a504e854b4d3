"""The images of a folder: path, label, width and height; scanned once, kept in a file."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness.config.schema import Config
from harness.data.sources.digest import (
    UNLABELLED_KEY,
    combined_digest,
    digests_by_class,
    positions_by_class,
)
from harness.data.sources.index_places import cache_places, lock_first
from harness.data.sources.listing import SUFFIXES, class_folders, equal_but_for_form, image_names
from harness.data.sources.scan import header_fault, read_sizes, size_of
from harness.errors import UserError
from harness.recipe.losses import UNLABELLED

FORMAT_VERSION = 1
MEND_OR_SKIP = "mend it or set data.on_bad_image=skip"
# A folder changed as short as this before its listing may change again within one tick of the
# file system's clock: its time stamp proves nothing (as git's "racily clean" files).
RACY_NS = 2_000_000_000


@dataclass(frozen=True, eq=False)
class Index:
    """N images below `folder`, sorted by class and name: an image's id is its position here.

    `names` (N,) are the file names, as bytes, within the folder of their class; `labels` int64
    (N,); `widths`, `heights` int32 (N,) in pixels as stored (EXIF orientation not applied), 0
    where the header cannot be read. `cache`: the file that keeps this index, if any, and
    `kept_digests` the digests of the classes that it holds (a cache of an older harness: none).
    Images without a class, their label UNLABELLED, are in the folder `unlabelled` beside `folder`.
    """

    folder: Path
    classes: tuple[str, ...]
    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    cache: Path | None = None
    kept_digests: dict[str, str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over classes, file names, labels, widths and heights.

        The same for the same data in another folder or on another machine.
        """
        return combined_digest(self.class_digests())

    def class_digests(self) -> dict[str, str]:
        """Class -> digest of its images (see digests_by_class), unlabelled ones last."""
        return self._computed_digests if self.kept_digests is None else self.kept_digests

    @cached_property
    def _computed_digests(self) -> dict[str, str]:
        return digests_by_class(self.classes, self.names, self.labels, self.widths, self.heights)

    def sizes_of(self, name: str) -> dict[str, tuple[int, int]]:
        """File name -> width and height of the images of a class, or of UNLABELLED_KEY."""
        images = positions_by_class(self.labels, len(self.classes))[
            [*self.classes, UNLABELLED_KEY].index(name)
        ].tolist()
        return {
            os.fsdecode(bytes(self.names[i])): (int(self.widths[i]), int(self.heights[i]))
            for i in images
        }

    def relabelled(self, classes: Sequence[str]) -> Index:
        """The same images with the positions in `classes`, which holds all of theirs, as labels."""
        labels = np.array([classes.index(name) for name in self.classes], dtype=np.int64)
        return replace(self, classes=tuple(classes), labels=labels[self.labels], kept_digests=None)

    def without_images(self) -> Index:
        """The same classes, of no images."""
        arrays = {
            name: getattr(self, name)[:0] for name in ("names", "labels", "widths", "heights")
        }
        return replace(self, **arrays, kept_digests=None)

    @cached_property
    def folders(self) -> tuple[Path, ...]:
        """By label; that of the label UNLABELLED (-1) is the last."""
        return (*(self.folder / name for name in self.classes), self.folder.parent / "unlabelled")

    def relative_path(self, image_id: int) -> str:
        """class/name of an image, relative to `folder`; unlabelled/name where it has no class."""
        path = self.path(image_id)
        return f"{path.parent.name}/{path.name}"

    def path(self, image_id: int) -> Path:
        name = os.fsdecode(bytes(self.names[image_id]))
        return self.folders[self.labels[image_id]] / name


def index_checksum(index: Index) -> str:
    """SHA-256 by which caches of soft targets tell indices apart, as they did before `digest`."""
    total = hashlib.sha256("\n".join(index.classes).encode())
    for array in (index.names, index.labels, index.widths, index.heights):
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def load_index(data_root: str | Path, split: str) -> Index:
    """The index of the folder data_root/split ("train" or "val"): class folders of images.

    Kept beside the data, or in the user's cache folder where that cannot be written. Scanned
    anew when classes or the contents of their folders change; one process scans, others wait. A
    scan of many images that was interrupted goes on where it was.
    Raises UserError for a missing or empty folder and a class without images.
    """
    folder = Path(data_root) / split
    return _load(folder, class_folders(folder))


def load_unlabelled(data_root: str | Path) -> Index:
    """The index of the flat folder data_root/unlabelled; kept, and raises, as load_index."""
    folder = Path(data_root) / "unlabelled"
    if not folder.is_dir() or not image_names(folder):
        raise UserError(
            f"{folder}: no images ({', '.join(SUFFIXES)}) in it; add some, or set "
            "data.unlabelled_images=0"
        )
    return _load(folder, {".": folder.stat().st_mtime_ns})  # its one class folder is itself


def load_indices(config: Config) -> tuple[Index, Index]:
    """The training images, unlabelled ones behind the labelled, and the validation images.

    Raises UserError where the folders are not the data that the config describes.
    """
    root, data = config.run.data_root, config.data
    train, val = load_index(root, "train"), load_index(root, "val")
    check_indices(train, val, config)
    if data.unlabelled_images == 0:
        return train, val
    unlabelled = load_unlabelled(root)
    check_count(unlabelled, "unlabelled_images", data.unlabelled_images)
    check_headers(unlabelled, data.on_bad_image == "skip")
    both = [(getattr(train, a), getattr(unlabelled, a)) for a in ("names", "widths", "heights")]
    names, widths, heights = map(np.concatenate, both)
    labels = np.concatenate([train.labels, np.full(len(unlabelled), UNLABELLED)])
    cache = train.cache and train.cache.with_name(".harness-index-*.npz")  # one of the two
    (digest,) = unlabelled.class_digests().values()
    digests = train.class_digests() | {UNLABELLED_KEY: digest}
    index = Index(train.folder, train.classes, names, labels, widths, heights, cache, digests)
    return index, val


def _load(folder: Path, changed_ns: dict[str, int]) -> Index:
    places = cache_places(folder)
    for place in places:
        if index := _read_cache(place, folder, changed_ns):
            return index
    with lock_first(places) as cache:
        index = _read_cache(cache, folder, changed_ns) if cache else None
        return index or _scan(folder, changed_ns, cache)


def check_indices(train: Index, val: Index, config: Config) -> None:
    """Raises UserError where the folders are not the data that the config describes."""
    data = config.data
    for index, key, expected in (
        (train, "train_images", data.train_images),
        (val, "val_images", data.val_images),
    ):
        check_count(index, key, expected)
    if train.classes != val.classes:
        only_train = sorted({*train.classes} - {*val.classes})
        only_val = sorted({*val.classes} - {*train.classes})
        parts = [
            f"{some_of(names)} only in {index.folder}"
            for names, index in ((only_train, train), (only_val, val))
            if names
        ]
        if names := next(iter(equal_but_for_form([*only_train, *only_val])), None):
            parts.append(
                f"{' and '.join(map(ascii, names))} differ in Unicode form only (NFC, NFD)"
            )
        raise UserError(
            f"the classes of train and val differ: {'; '.join(parts)}; mend the folders"
        )
    if len(train.classes) != data.classes:
        raise UserError(
            f"{train.folder}: {len(train.classes)} classes, but data.classes is {data.classes}; "
            f"complete the folder or set data.classes={len(train.classes)}"
        )
    for index, skip in ((train, data.on_bad_image == "skip"), (val, False)):
        check_headers(index, skip, "mend it" if index is val else MEND_OR_SKIP)


def check_count(index: Index, key: str, expected: int) -> None:
    """Raises UserError where an index does not have as many images as data.`key` says."""
    if len(index) != expected:
        raise UserError(
            f"{index.folder}: {len(index)} images, but data.{key} is {expected}; "
            f"complete the folder or set data.{key}={len(index)}"
        )


def check_headers(index: Index, skip: bool, remedy: str = MEND_OR_SKIP) -> None:
    """Raises UserError, with the `remedy`, for the first image without a header, but for `skip`."""
    bad = np.flatnonzero(index.widths == 0)
    if len(bad) and not skip:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        path = index.path(bad[0])
        why = header_fault(path) or "no JPEG or PNG header"
        raise UserError(f"{path}{more}: cannot be decoded: {why}; {remedy}")


def some_of(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _scan(folder: Path, changed_ns: dict[str, int], cache: Path | None) -> Index:
    scanned_ns = time.time_ns()
    names = {name: image_names(folder / name) for name in changed_ns}
    if empty := [name for name, found in names.items() if not found]:
        raise UserError(
            f"{folder}: no images ({', '.join(SUFFIXES)}) in class {some_of(empty)}; "
            "add some (those in subfolders do not count) or remove the folder; "
            f"`harness data check {folder.parent}` says what is in it"
        )
    flat = [os.fsencode(name) for found in names.values() for name in found]
    partial = cache.with_suffix(".partial") if cache else None
    sizes = read_sizes(folder, names, changed_ns, partial)
    labels = np.repeat(np.arange(len(names)), [len(found) for found in names.values()])
    index = Index(
        folder, tuple(names), np.array(flat), labels, sizes[:, 0].copy(), sizes[:, 1].copy(), cache
    )
    if cache is not None:
        _write_cache(cache, index, list(changed_ns.values()), scanned_ns)
    if partial is not None:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return index


def _write_cache(place: Path, index: Index, changed_ns: Sequence[int], scanned_ns: int) -> None:
    """Atomic. A cache that cannot be written is a warning."""
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            np.savez(
                stream,
                version=FORMAT_VERSION,
                scanned_ns=scanned_ns,
                changed_ns=np.array(changed_ns, dtype=np.int64),
                classes=np.array([os.fsencode(name) for name in index.classes]),
                digests=np.array(list(index.class_digests().values())),
                names=index.names,
                labels=index.labels.astype(np.int32),
                widths=index.widths,
                heights=index.heights,
            )
        os.replace(temporary, place)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        print(f"warning: {place}: not written: {error.strerror}; going on", file=sys.stderr)


def _read_cache(place: Path, folder: Path, changed_ns: dict[str, int]) -> Index | None:
    """The index kept at `place`, or None where there is none, or none of today's folder."""
    try:
        with np.load(place, allow_pickle=False) as file:
            if int(file["version"]) != FORMAT_VERSION:
                return None
            kept = {key: file[key] for key in file.files}
        classes = tuple(os.fsdecode(bytes(name)) for name in kept["classes"])
        if dict(zip(classes, kept["changed_ns"].tolist(), strict=True)) != changed_ns:
            return None
        labels = kept["labels"].astype(np.int64)
        index = Index(
            folder,
            classes,
            kept["names"],
            labels,
            kept["widths"],
            kept["heights"],
            place,
            _kept_digests(kept, classes),
        )
        scanned_ns = int(kept["scanned_ns"])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    bad = np.flatnonzero(index.widths == 0)
    paths = [index.path(image_id) for image_id in bad.tolist()]
    if any(not path.exists() or size_of(path) != (0, 0) for path in paths):
        return None  # removed or mended since
    counts = np.bincount(labels, minlength=len(classes))
    for name, count in zip(classes, counts, strict=True):
        racy = changed_ns[name] > scanned_ns - RACY_NS
        if racy and len(image_names(folder / name)) != count:
            return None
    return index


def _kept_digests(kept: dict[str, NDArray], classes: tuple[str, ...]) -> dict[str, str] | None:
    """The digests in a cache's arrays; None where an older harness wrote it, without digests."""
    if "digests" not in kept:
        return None
    return dict(zip(classes, kept["digests"].tolist(), strict=True))
