"""Reads tar archives that are not trusted: members are checked and read, never extracted."""

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from gzip import BadGzipFile
from pathlib import Path, PurePosixPath
from typing import IO

from harness.errors import UserError

# Above any file of these data sets (an official CIFAR-10 batch has 31 MB, the largest image of
# ImageNet 15 MB), so that a small compressed archive cannot fill the memory.
MOST_BYTES = 2**28


@contextmanager
def opened(path: Path | str, content: IO[bytes] | None = None) -> Iterator[tarfile.TarFile]:
    """The archive at `path`, or the one in `content`, which `path` then names in errors.

    UserError: no such file, no tar archive, or one found damaged while it is open.
    """
    try:
        with tarfile.open(path, "r:*", fileobj=content) as archive:
            yield archive
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, BadGzipFile) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: damaged or no tar archive ({reason}); get it again") from error
    except FileNotFoundError as error:
        if error.filename != str(path):
            raise
        raise UserError(f"{path}: no such archive") from None


def members(archive: tarfile.TarFile, path: Path | str) -> Iterator[tarfile.TarInfo]:
    """The archive's regular files, in its order.

    UserError naming the member: anything but a plain file or folder (links, devices, sparse
    files), a name that is absolute, holds `..` or a control character, or comes twice.
    """
    seen: set[PurePosixPath] = set()
    for member in archive:
        name = PurePosixPath(member.name)
        if not (member.isdir() or member.isreg()) or member.sparse is not None:
            raise refusal(path, member, "neither a plain file nor a folder")
        if name.is_absolute() or ".." in name.parts:
            raise refusal(path, member, "leads out of the folder")
        if not member.name.isprintable():
            raise refusal(path, member, "a control character in its name")
        if member.isreg():
            if name in seen:
                raise refusal(path, member, "there twice")
            seen.add(name)
            yield member


def read(archive: tarfile.TarFile, path: Path | str, member: tarfile.TarInfo) -> bytes:
    """The member's bytes; tarfile itself raises where the archive ends before the last of them."""
    if member.size > MOST_BYTES:
        raise refusal(path, member, f"{member.size:,} bytes, more than any official file")
    file = archive.extractfile(member)
    assert file is not None, "members() gives regular files only"
    return file.read()


def refusal(path: Path | str, member: tarfile.TarInfo, why: str) -> UserError:
    """One line, whatever the name holds."""
    return UserError(f"{path}: member {member.name[:120]!a} refused: {why}")
