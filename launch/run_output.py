"""The output of a run for people: its error, and the end of its log."""

from __future__ import annotations

from pathlib import Path

from harness.config.schema import NO_EXPECTATION
from harness.runs.headline import read_headline
from harness.runs.logging.jsonl import Record

TAIL_BYTES = 1 << 16


def finished_error(run: Path, status: Record) -> str:
    """Return a finished run's error, the epochs it covers, and the expected error."""
    expected = status.get("expected")
    beside = NO_EXPECTATION if expected is None else f"expected {expected:.2f} %"
    return f"error {read_headline(run, status)}, {beside}"


def tail(path: Path) -> list[str]:
    """Return the last whole lines of a file; [] where there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return lines[1:] if size > TAIL_BYTES else lines
