"""The machine at hand as a launcher."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from pathlib import Path

from harness.errors import UserError
from harness.outcome import State, recorded_state
from launch.backend import Request, RunState, Stage, Submission
from launch.local.study import LocalStudy, devices_here
from launch.records import LOCAL, Record, read_records, read_status


class LocalBackend:
    """Runs on this machine, under the command that starts them."""

    def submit(self, request: Request) -> Submission:
        """Run everything to its end, or until a signal; runs wait for their teachers by themselves.

        There is no cluster file.
        """
        devices = devices_here(request.runs, request.at_once)
        code = LocalStudy(request.target, request.runs, devices).run()
        return Submission([*read_records(request.target, LOCAL).values()], code)

    def preview(self, request: Request) -> str:
        """Return the names of the runs that have not finished."""
        return "\n".join(run.name for run in request.runs if not run.is_finished())

    def state(self, record: Record) -> RunState | None:
        """Return whether the run is yet to start, or its process lives."""
        if not record.job_id:
            return RunState(Stage.QUEUED)
        if not _lives(record):
            return None
        status = read_status(Path(record.run))
        running = recorded_state(status) is State.RUNNING
        began = running and status.get("pid") == int(record.job_id)
        return RunState(Stage.RUNNING if began else Stage.STARTING, f"on {record.host}")

    def cancel(self, record: Record) -> None:
        """Have the run's process stop with a checkpoint."""
        if record.host != socket.gethostname():
            raise UserError(f"{record.name}: runs on {record.host}; cancel it there")
        if _lives(record):
            with suppress(ProcessLookupError):
                os.kill(int(record.job_id), signal.SIGTERM)


def _lives(record: Record) -> bool:
    """Return True where the record's process is one of this machine and of this run.

    Process numbers are used again, so the command line must name the run's config.
    """
    if record.host != socket.gethostname() or not record.job_id:
        return False
    try:
        command = Path(f"/proc/{record.job_id}/cmdline").read_bytes()
    except OSError:
        return False
    return os.fsencode(record.config) in command.split(b"\0")
