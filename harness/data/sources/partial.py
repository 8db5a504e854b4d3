"""Results of a scan, recorded as they come, so that an interrupted scan continues."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

Value = TypeVar("Value")


class PartialResults(Generic[Value]):
    """JSON values by key in the file `path`; None keeps nothing. `field` is their name there.

    The scan matters more than its record, so errors of the file are ignored.
    """

    def __init__(self, path: Path | None, field: str) -> None:
        self._path, self._field = path, field

    def add(self, key: str, value: Value) -> None:
        """Append a line. It starts with a newline, lest a line torn by a kill spoil it."""
        if self._path is None:
            return
        line = json.dumps({"key": key, self._field: value})
        with suppress(OSError), open(self._path, "a") as stream:
            stream.write(f"\n{line}\n")

    def read(self) -> dict[str, Value]:
        """Return the values by key, from the complete lines; empty where there is no file."""
        kept: dict[str, Value] = {}
        with suppress(OSError):
            for line in self._path.read_bytes().splitlines() if self._path else []:
                with suppress(ValueError, KeyError, TypeError):
                    record = json.loads(line)
                    kept[record["key"]] = record[self._field]
        return kept

    def remove(self) -> None:
        """Remove the file, once the scan is complete and stored."""
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
