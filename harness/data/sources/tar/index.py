"""The index of archives: where each image of a split lies. Kept in the user's cache folder."""

from __future__ import annotations

import io
import os
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness.atomic_file import write_atomically
from harness.data.sources.digest import UNLABELLED_KEY, digests_by_class
from harness.data.sources.listing import equal_but_for_form
from harness.data.sources.tar.labels import Split
from harness.data.sources.tar.members import BLOCK
from harness.data.sources.tar.reader import Archive, ArchiveReader
from harness.errors import UserError
from harness.recipe.losses import UNLABELLED

FORMAT_VERSION = 1
SAMPLES = 16  # headers compared when an index is read


@dataclass(frozen=True, eq=False)
class Ignored:
    """Members that are not read: (M,) each."""

    archives: NDArray[np.int32]
    paths: NDArray[np.bytes_]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The images of a split, in order; arrays are (N,).

    files: the archives, and the development kit where labels come from it.
    archives: positions in `files`; offsets, sizes: of the contents, in bytes; headers: the CRC-32
        of the header before each.
    """

    files: tuple[Archive, ...]
    classes: tuple[str, ...]
    digests: dict[str, str]
    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    archives: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    headers: NDArray[np.uint32]
    ignored: Ignored


def build_index(files: Sequence[Archive], split: Split, where: Path) -> TarIndex:
    """Return the index of a split. Raises UserError for classes that look alike."""
    for alike in equal_but_for_form(split.classes):
        raise UserError(
            f"{where}: the classes {' and '.join(map(ascii, alike))} look alike, as their names "
            "differ in Unicode form only (NFC, NFD); merge or rename them"
        )
    members = [image.member for image in split.images]
    places = {name: place for place, name in enumerate(split.classes)}
    names = np.array([os.fsencode(image.name) for image in split.images])
    labels = np.array([places.get(x.class_name, UNLABELLED) for x in split.images], dtype=np.int64)
    widths = np.array([member.width for member in members], dtype=np.int32)
    heights = np.array([member.height for member in members], dtype=np.int32)
    return TarIndex(
        files=tuple(files),
        classes=split.classes,
        digests=digests_by_class(split.classes, names, labels, widths, heights),
        names=names,
        labels=labels,
        widths=widths,
        heights=heights,
        archives=np.array([image.archive for image in split.images], dtype=np.int32),
        offsets=np.array([member.offset for member in members], dtype=np.int64),
        sizes=np.array([member.size for member in members], dtype=np.int64),
        headers=np.array([member.header for member in members], dtype=np.uint32),
        ignored=Ignored(
            np.array([number for number, _ in split.ignored], dtype=np.int32),
            np.array([os.fsencode(member.path) for _, member in split.ignored], dtype=np.bytes_),
            np.array([member.offset for _, member in split.ignored], dtype=np.int64),
            np.array([member.size for _, member in split.ignored], dtype=np.int64),
        ),
    )


COLUMNS = ("names", "labels", "widths", "heights", "archives", "offsets", "sizes", "headers")
OF_IGNORED = ("archives", "paths", "offsets", "sizes")


def write_index(place: Path, index: TarIndex) -> None:
    """Write atomically. An index that cannot be written is a warning."""
    content = io.BytesIO()
    np.savez(
        content,
        version=FORMAT_VERSION,
        files=np.array([os.fsencode(file.path) for file in index.files]),
        file_sizes=np.array([file.size for file in index.files], dtype=np.int64),
        changed_ns=np.array([file.changed_ns for file in index.files], dtype=np.int64),
        classes=np.array([os.fsencode(name) for name in index.classes], dtype=np.bytes_),
        digests=np.array(list(index.digests.values())),
        **{name: getattr(index, name) for name in COLUMNS},
        **{f"ignored_{name}": getattr(index.ignored, name) for name in OF_IGNORED},
    )
    try:
        write_atomically(place, content.getvalue())
    except OSError as error:
        print(f"warning: {place}: not written: {error.strerror}; continuing", file=sys.stderr)


def read_index(place: Path, files: Sequence[Archive]) -> TarIndex | None:
    """Return the index at `place`, or None where it is missing or not of these files.

    Compares their paths, sizes and times, and some headers.
    """
    try:
        with np.load(place, allow_pickle=False) as stored:
            if int(stored["version"]) != FORMAT_VERSION:
                return None
            kept = {key: stored[key] for key in stored.files}
        if _files(kept) != [*files]:
            return None
        classes = tuple(os.fsdecode(bytes(name)) for name in kept["classes"])
        keys = classes or (UNLABELLED_KEY,)
        index = TarIndex(
            files=tuple(files),
            classes=classes,
            digests=dict(zip(keys, kept["digests"].tolist(), strict=True)),
            ignored=Ignored(**{name: kept[f"ignored_{name}"] for name in OF_IGNORED}),
            **{name: kept[name] for name in COLUMNS},
        )
        return index if _headers_match(index) else None
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def _files(kept: dict[str, NDArray]) -> list[Archive]:
    columns = kept["files"], kept["file_sizes"].tolist(), kept["changed_ns"].tolist()
    rows = zip(*columns, strict=True)
    return [Archive(Path(os.fsdecode(bytes(path))), size, ns) for path, size, ns in rows]


def _headers_match(index: TarIndex) -> bool:
    """Return whether SAMPLES headers, evenly spread, are those that were indexed."""
    reader = ArchiveReader(index.files)
    for image in np.linspace(0, len(index.names) - 1, SAMPLES).astype(np.int64).tolist():
        header = reader.read(int(index.archives[image]), int(index.offsets[image]) - BLOCK, BLOCK)
        if zlib.crc32(header) != index.headers[image]:
            return False
    return True
