"""The interface of a launcher: what starts runs, knows their state and cancels them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from launch.cluster_file import Cluster
from launch.records import Record
from launch.run_spec import RunSpec


class Stage(Enum):
    """How far a run has come."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    ENDING = "ending"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    CANCELLED = "cancelled"


ACTIVE = (Stage.QUEUED, Stage.STARTING, Stage.RUNNING, Stage.ENDING)


@dataclass(frozen=True)
class RunState:
    """The stage of a run, with a reason for people. `requeues`: how often its job was requeued."""

    stage: Stage
    reason: str = ""
    requeues: int | None = None

    @property
    def active(self) -> bool:
        """Return True while the launcher has the run: waiting, or under way."""
        return self.stage in ACTIVE


@dataclass(frozen=True)
class Request:
    """Runs to be started.

    `cluster` is the cluster file; only runs on this machine have none. `target` is a run folder or
    a study's folder, which `runs` belong to. `after` are the runs that must have finished first.
    `at_once` is how many may run together, None leaving it to the launcher.
    """

    cluster: Cluster | None
    target: Path
    runs: Sequence[RunSpec]
    after: Sequence[Record] = ()
    at_once: int | None = None


@dataclass(frozen=True)
class Submission:
    """The records of the runs that were started.

    `exit_code` is that of a launcher that has run them to the end, else None.
    """

    records: Sequence[Record]
    exit_code: int | None = None


class Backend(Protocol):
    """A launcher; docs/launchers.md has a complete example. It is constructed without arguments."""

    def submit(self, request: Request) -> Submission:
        """Start the runs and write their records. Raises UserError where that is impossible."""
        ...

    def preview(self, request: Request) -> str:
        """Return what `submit` would start, for --dry-run, without writing anything."""
        ...

    def state(self, record: Record) -> RunState | None:
        """Return the state of a run that has not finished; None where it has simply ended.

        Then its run folder shows whether it stopped or failed. Raises UserError where the launcher
        cannot be asked.
        """
        ...

    def cancel(self, record: Record) -> None:
        """Have a waiting run not start, and a running one stop. Raises UserError."""
        ...
