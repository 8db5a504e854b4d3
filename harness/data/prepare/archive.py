"""Untrusted tar archives: members are checked and read, never extracted."""

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from gzip import BadGzipFile
from pathlib import Path, PurePosixPath
from typing import IO

from harness.errors import UserError

# Larger than any file of these data sets (an official CIFAR-10 batch has 31 MB, the largest image
# of ImageNet 15 MB), so a small compressed archive cannot exhaust the memory.
MOST_BYTES = 2**28


@contextmanager
def open_archive(path: Path | str, content: IO[bytes] | None = None) -> Iterator[tarfile.TarFile]:
    """Open the archive at `path`, or the one in `content`, which `path` then names in errors.

    Raises UserError if it does not exist, is not a tar archive, or turns out to be damaged.
    """
    try:
        with tarfile.open(path, "r:*", fileobj=content) as archive:
            yield archive
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, BadGzipFile) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path}: damaged or not a tar archive ({reason}); download it again"
        ) from error
    except FileNotFoundError as error:
        if error.filename != str(path):
            raise
        raise UserError(f"{path}: no such archive") from None


def members(archive: tarfile.TarFile, path: Path | str) -> Iterator[tarfile.TarInfo]:
    """Yield the archive's regular files, in its order.

    Raises a UserError that names the member for anything but a plain file or folder (links,
    devices, sparse files) and for a name that is absolute, contains `..` or a control character,
    or repeats.
    """
    seen: set[PurePosixPath] = set()
    for member in archive:
        name = PurePosixPath(member.name)
        if not (member.isdir() or member.isreg()) or member.sparse is not None:
            raise refusal(path, member, "it is neither a plain file nor a folder")
        if name.is_absolute() or ".." in name.parts:
            raise refusal(path, member, "it points outside the folder")
        if not member.name.isprintable():
            raise refusal(path, member, "its name contains a control character")
        if member.isreg():
            if name in seen:
                raise refusal(path, member, "it occurs twice")
            seen.add(name)
            yield member


def read_member(archive: tarfile.TarFile, path: Path | str, member: tarfile.TarInfo) -> bytes:
    """Return the member's bytes; tarfile itself raises if the archive is truncated."""
    if member.size > MOST_BYTES:
        raise refusal(path, member, f"its {member.size:,} bytes exceed any official file")
    file = archive.extractfile(member)
    assert file is not None, "members() yields regular files only"
    return file.read()


def refusal(path: Path | str, member: tarfile.TarInfo, why: str) -> UserError:
    """Return the error for a member, one line whatever its name contains."""
    return UserError(f"{path}: member {member.name[:120]!a} refused: {why}")
