"""Helpers that create archives, compare folders and kill processes."""

import io
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError


def tar(*files: tuple[str | tarfile.TarInfo, bytes], mode: str = "w") -> bytes:
    """Create an archive of (name or header, content)."""
    archive_bytes = io.BytesIO()
    with tarfile.open(fileobj=archive_bytes, mode=mode) as archive:  # type: ignore[call-overload]
        for header, content in files:
            if isinstance(header, str):
                header = tarfile.TarInfo(header)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return archive_bytes.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header, b""


def tree(folder: Path) -> dict[str, bytes]:
    """Return files by path, including the marker."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def error_of(call: Callable[..., str], *args: Any, **kwargs: Any) -> str:
    """Return the message of the UserError that the call raises, which must be one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


CHILD = """
import os, resource, signal, sys
from pathlib import Path
from harness.data.prepare.digits import prepare_digits
from harness.data.prepare.imagenet import prepare_imagenet
from harness.data.prepare.prepared_folder import Counts
from harness.errors import UserError
{before}
try:
    print({call})
except UserError as error:
    print("UserError", error)
{after}
"""
# An audit hook sees every rename of the process: SIGKILL at the n-th, before it is done.
KILL_AT_RENAME = """
renames = 0
def hook(event, arguments):
    global renames
    renames += event == "os.rename"
    if event == "os.rename" and renames == {n}:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


def child(
    call: str, *arguments: Path, before: str = "", after: str = "", under: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Start a process that prints what the call returns, or "UserError" and its message."""
    script = CHILD.format(before=before, call=call, after=after)
    command = [*under, sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)
