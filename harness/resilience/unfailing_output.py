"""Standard output and error whose failure a run survives, as its terminal may be closed."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class _UnfailingFile(io.FileIO):
    """Drops what cannot be written: a closed terminal, a pipe without a reader, a full disk."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)


@contextmanager
def unfailing_output() -> Iterator[None]:
    """Within, a write to standard output or error never raises OSError.

    A run whose ssh connection drops must still write its checkpoint, and its next progress line
    must not be what ends it. All that it prints about its course is in log.jsonl, too.
    """
    usual = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_unfailing, usual)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = usual


def _unfailing(stream: TextIO) -> TextIO:
    """Return the same file with the same settings; return streams without a file as they are."""
    if not isinstance(stream, io.TextIOWrapper):  # None where the descriptor was closed
        return stream
    try:
        raw = _UnfailingFile(stream.fileno(), "w", closefd=False)
    except io.UnsupportedOperation:
        return stream
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
