"""Files that a user names: checked before the work, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from harness.atomic_file import temporary_path, write_atomically
from harness.errors import UserError


def check_output(path: Path, option: str) -> None:
    """Raise UserError, before any work is done, where `write_output` could not write `path`.

    option: such as --to, for the message. Folders that are missing are an error.
    """
    try:
        if path.is_dir():
            raise UserError(f"{option} {path}: is a folder; name a file")
        if _is_replaceable(path):
            probe = temporary_path(_target(path))
            probe.touch()  # what the write will do first; os.access knows no full or frozen disks
            probe.unlink()
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from None


def write_output(path: Path, option: str, content: str | bytes) -> None:
    """Write `content`; names within that are not UTF-8 keep their bytes. Raises UserError."""
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
    """False for a pipe or a device such as /dev/stdout, which a rename would destroy."""
    return path.is_file() or not path.exists()


def _target(path: Path) -> Path:
    """The file itself where `path` is a link: the rename must not replace the link."""
    return Path(os.path.realpath(path))
