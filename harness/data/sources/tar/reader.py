"""Positioned reads from archives, retried, for several threads and forked processes together."""

from __future__ import annotations

import errno
import io
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# Errors that network file systems report in passing; waiting heals them, or reopening the file.
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
RETRY_AFTER_S = (0.1, 0.5, 2.0)


@dataclass(frozen=True)
class Archive:
    """An archive file as it was when it was listed."""

    path: Path
    size: int  # bytes
    changed_ns: int

    @classmethod
    def at(cls, path: Path) -> Archive:
        """Return the archive at `path` as it is now. Raises OSError."""
        found = path.stat()
        return cls(path, found.st_size, found.st_mtime_ns)


class ChangedArchive(OSError):
    """An archive is not the one that was listed."""


class ShortRead(OSError):
    """An archive ends within the bytes to read."""


class ArchiveReader:
    """Reads ranges of `archives`. Has no position and no lock, so threads and forks may share it.

    Up to half of the descriptors that the process may open stay open; other archives are opened
    for each read.
    """

    def __init__(self, archives: Sequence[Archive]) -> None:
        self._archives = archives
        self._open: dict[int, _OpenArchive] = {}
        self._most_open = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset` of archive `number`, in one operation where possible.

        Retries what may pass. Raises OSError: ShortRead where the archive ends before,
        ChangedArchive where it is not the one that was listed.
        """
        for pause_s in RETRY_AFTER_S:
            try:
                return self._read_once(number, offset, size)
            except OSError as error:
                if error.errno not in TRANSIENT:
                    raise
            self._open.pop(number, None)  # a stale handle stays stale
            time.sleep(pause_s)
        return self._read_once(number, offset, size)

    def _read_once(self, number: int, offset: int, size: int) -> bytes:
        file = self._file(number)
        content = os.pread(file.descriptor, size, offset)
        while len(content) < size:  # a read may return less than there is
            more = os.pread(file.descriptor, size - len(content), offset + len(content))
            if not more:
                end = offset + len(content)
                raise ShortRead(errno.EIO, f"the archive ends at offset {end}, within the image")
            content += more
        return content

    def _file(self, number: int) -> _OpenArchive:
        file = self._open.get(number)
        if file is None:
            file = _OpenArchive(self._archives[number])
            if len(self._open) < self._most_open:
                file = self._open.setdefault(number, file)  # another thread may have been first
        return file


class _OpenArchive:
    """A descriptor that closes once nobody reads from it any more."""

    def __init__(self, archive: Archive) -> None:
        self.descriptor = -1
        self.descriptor = os.open(archive.path, os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(self.descriptor)
        if (found.st_size, found.st_mtime_ns) != (archive.size, archive.changed_ns):
            raise ChangedArchive("the archive has changed since it was indexed")
        # images are read in random order, so reading ahead would only waste bandwidth
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class ArchiveStream(io.RawIOBase):
    """An archive as a seekable file of positioned, retried reads."""

    def __init__(self, archive: Archive, start: int = 0) -> None:
        self._reader, self._size, self._position = ArchiveReader([archive]), archive.size, start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position. Nothing is read."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill the buffer as far as the archive goes."""
        view = memoryview(buffer).cast("B")
        size = max(min(len(view), self._size - self._position), 0)
        if size:
            view[:size] = self._reader.read(0, self._position, size)
            self._position += size
        return size
