"""The interface of a logger: what receives a run's events and scalars."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from harness.config.schema import Config
from harness.runs.logging.jsonl import Record


class Sink(Protocol):
    """Receives what rank 0 logs. A further logger implements it; see docs/loggers.md."""

    def event(self, event: Record) -> None:
        """Take one event: its name under "event", the steps done under "step", "time", values."""
        ...

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers by name, such as train/loss, after `step` steps."""
        ...

    def flush(self) -> None:
        """Write out what was taken. Called before each checkpoint, so no log lags behind one."""
        ...

    def close(self) -> None:
        """Write out what was taken and close; nothing is called afterwards."""
        ...


# (run folder, config, first step of this start) -> sink
OpenSink = Callable[[Path, Config, int], Sink]
