"""log.jsonl: one JSON object per line."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a log can be read without PyTorch
    pass


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that stand: a torn one is ignored, superseded ones are left out."""
    return standing_lines(read_lines(path))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a log, in the order of writing; one that a crash cut off is ignored."""
    if not path.exists():
        return []
    texts = path.read_text(errors="replace").splitlines()
    try:
        return json.loads(f"[{','.join(texts)}]")  # at once: twice as fast as line by line
    except json.JSONDecodeError:
        return [line for text in texts if (line := _parse_line(text))]


def _parse_line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line if isinstance(line, dict) else None


def standing_lines(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the superseded ones.

    A run resumed at step s goes on from there, so what was logged after s before is superseded.
    """
    standing: list[dict[str, Any]] = []
    for line in lines:
        if line["event"] == "resume":
            standing = [kept for kept in standing if kept["step"] <= line["step"]]
        standing.append(line)
    return standing


class JsonlSink:
    """log.jsonl, a line a write. A disk that is full or gone is told once, and the run goes on."""

    def __init__(self, path: Path) -> None:
        self._path, self._warned = path, False
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        # a torn last line is ended, so that the next one stands by itself
        self._torn = path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line of JSON."""
        content = (json.dumps(line, allow_nan=False) + "\n").encode()
        if self._torn:
            content = b"\n" + content
        try:
            if os.write(self._file, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._torn = self._warned = False
        except OSError as error:
            self._torn = True
            if not self._warned:
                print(f"warning: {self._path}: not written: {error.strerror}; going on")
            self._warned = True

    def flush(self) -> None:
        """To the disk."""
        with suppress(OSError):  # a full disk was told when the line was written
            os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)
