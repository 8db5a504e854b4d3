"""Archives copied to storage of this node, once for all its ranks and for later runs."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from harness.data.sources.tar.reader import Archive, ArchiveReader
from harness.data.sources.tar.source import TarSource
from harness.errors import UserError

PIECE = 8 * 2**20  # bytes copied at a time


def staged(images: TarSource, stage_to: Path) -> TarSource:
    """Return the same images in copies of their archives below `stage_to`, made where missing.

    One process of the node copies while the others wait. A copy appears once its SHA-256, read
    back, is that of its archive. Raises UserError where there is no space and as reads do.
    """
    used = [images.files[number] for number in np.unique(images.archives).tolist()]
    folder = stage_to / f"harness-{_identity(images)}"
    copies = {archive: replace(archive, path=folder / archive.path.name) for archive in used}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            missing = [archive for archive in used if not _is_there(copies[archive])]
            _check_space(missing, folder)
            _copy_all(missing, folder, str(images.location))
    except OSError as error:
        where = error.filename or folder
        why = error.strerror or error
        raise UserError(f"run.stage_to: {where}: {why}; fix that, or remove run.stage_to") from None
    return replace(images, files=tuple(copies.get(file, file) for file in images.files))


def _identity(images: TarSource) -> str:
    """Return the same text for the same archives, whatever folder they are in."""
    total = hashlib.sha256(images.digest.encode() + images.headers.tobytes())
    for archive in images.files:
        about = archive.path.name, archive.size, archive.changed_ns
        total.update(repr(about).encode(errors="surrogateescape"))
    return total.hexdigest()[:16]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process of this node copies into the folder."""
    with open(folder / "lock", "a") as lock:
        with suppress(OSError):  # a file system without locks: every rank copies
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_there(copy: Archive) -> bool:
    return copy.path.exists() and Archive.at(copy.path) == copy


def _check_space(missing: Sequence[Archive], folder: Path) -> None:
    needed, free = sum(archive.size for archive in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"run.stage_to: {folder.parent}: {needed / 1e9:.1f} GB are to be copied there, but "
            f"{free / 1e9:.1f} GB are free; name another folder, or remove run.stage_to"
        )


def _copy_all(archives: Sequence[Archive], folder: Path, title: str) -> None:
    size = sum(archive.size for archive in archives)
    with tqdm(
        total=size,
        desc=f"staging {title}",
        unit="B",
        unit_scale=True,
        disable=None if size else True,
    ) as bar:
        for archive in archives:
            # of this process, as another's may be under way where there are no locks
            half = folder / f"{archive.path.name}.{os.getpid()}.partial"
            try:
                _copy(archive, half, bar)
                half.replace(folder / archive.path.name)
            finally:
                half.unlink(missing_ok=True)


def _copy(archive: Archive, half: Path, bar: tqdm) -> None:
    reader, expected, found = ArchiveReader([archive]), hashlib.sha256(), hashlib.sha256()
    with open(half, "w+b") as copy:
        for start in range(0, archive.size, PIECE):
            content = reader.read(0, start, min(PIECE, archive.size - start))
            expected.update(content)
            copy.write(content)
            bar.update(len(content))
        copy.flush()
        os.fsync(copy.fileno())
        # so that what is compared comes from the disk
        os.posix_fadvise(copy.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        copy.seek(0)
        while content := copy.read(PIECE):
            found.update(content)
    if found.digest() != expected.digest():
        raise UserError(
            f"run.stage_to: {half.parent}: the copy of {archive.path} differs from it; check the "
            "disk, or name another folder"
        )
    os.utime(half, ns=(archive.changed_ns, archive.changed_ns))
