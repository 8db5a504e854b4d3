"""log.jsonl: one JSON object per line."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

Record = dict[str, Any]  # a JSON object from a file: its values have the types that were written


def read_log(path: Path) -> list[Record]:
    """Return the lines of a log that count: without torn and superseded ones."""
    return standing_lines(read_lines(path))


def read_lines(path: Path) -> list[Record]:
    """Return all lines of a log in the order of writing, except one that a crash cut off."""
    if not path.exists():
        return []
    texts = path.read_text(errors="replace").splitlines()
    try:
        return json.loads(f"[{','.join(texts)}]")  # in one call, twice as fast as line by line
    except json.JSONDecodeError:
        return [line for text in texts if (line := _parse_line(text))]


def _parse_line(text: str) -> Record | None:
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    return line if isinstance(line, dict) else None


def standing_lines(lines: list[Record]) -> list[Record]:
    """Leave out superseded lines.

    A run resumed at step s continues from there, which supersedes what was logged after s before.
    """
    standing: list[Record] = []
    for line in lines:
        if line["event"] == "resume":
            standing = [kept for kept in standing if kept["step"] <= line["step"]]
        standing.append(line)
    return standing


class JsonlSink:
    """Appends to log.jsonl, one write per line.

    A write that fails is reported once, and the run continues.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._warned = path, False
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        # end a torn last line, so that the next one is a line of its own
        self._torn = path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"

    def event(self, event: Record) -> None:
        # JSON knows neither NaN nor infinity
        line = {k: v if _is_json(v) else None for k, v in event.items()}
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
                print(f"warning: {self._path}: not written: {error.strerror}; continuing")
            self._warned = True

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write nothing: events hold the same numbers."""

    def flush(self) -> None:
        with suppress(OSError):  # a full disk was reported when the line was written
            os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def _is_json(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
