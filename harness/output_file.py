"""Output files named by the user: checked before the work, written completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from harness.atomic_file import temporary_path, write_atomically
from harness.errors import UserError


def check_output(path: Path, option: str) -> None:
    """Raise UserError, before any work is done, if `write_output` could not write `path`.

    `option`, such as --to, is named in the message. A missing folder is an error.
    """
    try:
        if path.is_dir():
            raise UserError(f"{option} {path}: is a folder; name a file")
        if _is_replaceable(path):
            probe = temporary_path(_target(path))
            probe.touch()  # as the write will; os.access does not notice full or read-only disks
            probe.unlink()
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from None


def write_output(path: Path, option: str, content: str | bytes) -> None:
    """Write `content`; file names in it that are not UTF-8 keep their bytes. Raises UserError."""
    if isinstance(content, str):
        content = content.encode(errors="surrogateescape")
    try:
        if _is_replaceable(path):
            write_atomically(_target(path), content)
        else:
            path.write_bytes(content)
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from None


def _is_replaceable(path: Path) -> bool:
    """Return False for a pipe or a device such as /dev/stdout, which a rename would destroy."""
    return path.is_file() or not path.exists()


def _target(path: Path) -> Path:
    """Return the file behind a link, since the rename must not replace the link itself."""
    return Path(os.path.realpath(path))
