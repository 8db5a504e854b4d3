"""Jobs as SLURM knows them, read from scontrol."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from datetime import datetime

from harness.errors import UserError

PATIENCE_S = 30  # for a busy slurmctld
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
UNDER_WAY = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING")
UNKNOWN = "Invalid job id"
CANNOT_WRITE = 53  # slurmd's exit signal where it cannot open a job's output file


@dataclass(frozen=True)
class Job:
    """A job as slurmctld remembers it, which it does until some minutes after the job's end."""

    state: str
    reason: str
    restarts: int
    preempted: bool  # its grace time runs
    nodes: str
    started_s: float  # since the epoch; 0 where it has not started
    exit_code: int
    exit_signal: int

    @property
    def active(self) -> bool:
        return self.state in WAITING + UNDER_WAY


class SlurmUnavailable(UserError):
    """SLURM does not answer, so nothing is known of its jobs."""


def find_job(job_id: str) -> Job | None:
    """Return the job (12, in an array 12_3); None where SLURM does not know it, or no longer.

    Raises SlurmUnavailable.
    """
    command = ["scontrol", "--oneliner", "show", "job", job_id]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except FileNotFoundError:
        raise SlurmUnavailable(
            "scontrol is not on PATH; ask from a login node (docs/cluster.md)"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmUnavailable(
            f"scontrol: no answer in {PATIENCE_S} s (see scontrol ping)"
        ) from None
    fields = dict(re.findall(r"(\S+?)=(\S*)", done.stdout))
    if done.returncode and UNKNOWN not in done.stderr:
        raise SlurmUnavailable(f"scontrol: {' '.join(done.stderr.split())}")
    if "JobState" not in fields:
        return None
    return Job(
        state=fields["JobState"],
        reason=fields["Reason"],
        restarts=int(fields.get("Restarts", "0")),
        preempted=fields.get("PreemptTime", "None") != "None",
        nodes=fields.get("NodeList", ""),
        started_s=_seconds(fields.get("StartTime", "")),
        exit_code=int(fields.get("ExitCode", "0:0").split(":")[0]),
        exit_signal=int(fields.get("ExitCode", "0:0").split(":")[1]),
    )


def _seconds(local_time: str) -> float:
    try:
        return datetime.fromisoformat(local_time).timestamp()
    except ValueError:  # Unknown
        return 0.0


def requeue(job_id: str) -> str:
    """Put a job back into the queue; return why that failed, or ""."""
    return _failure(["scontrol", "requeue", job_id])


def cancel(job_id: str) -> str:
    """Cancel a job; return why that failed, or ""."""
    return _failure(["scancel", job_id])


def _failure(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.strip() if done.returncode else ""
