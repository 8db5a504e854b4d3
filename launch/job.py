"""What SLURM says of a job."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from datetime import datetime

PATIENCE_S = 30  # for a busy slurmctld
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
UNDER_WAY = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING")
CANNOT_WRITE = 53  # slurmd's exit signal where it cannot open a job's output file


@dataclass(frozen=True)
class Job:
    """A job as slurmctld remembers it (some minutes after its end it forgets it)."""

    state: str
    reason: str
    restarts: int
    preempted: bool  # its grace time runs
    nodes: str
    started_s: float  # since the epoch; 0 where it has not started
    exit_signal: int

    @property
    def active(self) -> bool:
        return self.state in WAITING + UNDER_WAY


def find_job(job_id: str) -> Job | None:
    """The job (12, in an array 12_3); None where SLURM knows no such job, or is silent."""
    command = ["scontrol", "--oneliner", "show", "job", job_id]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    fields = dict(re.findall(r"(\S+?)=(\S*)", done.stdout))
    if done.returncode or "JobState" not in fields:
        return None
    return Job(
        state=fields["JobState"],
        reason=fields["Reason"],
        restarts=int(fields.get("Restarts", "0")),
        preempted=fields.get("PreemptTime", "None") != "None",
        nodes=fields.get("NodeList", ""),
        started_s=_seconds(fields.get("StartTime", "")),
        exit_signal=int(fields.get("ExitCode", "0:0").split(":")[1]),
    )


def _seconds(local_time: str) -> float:
    try:
        return datetime.fromisoformat(local_time).timestamp()
    except ValueError:  # Unknown
        return 0.0


def requeue(job_id: str) -> str:
    """Puts a job back into the queue; returns why that failed, or ""."""
    command = ["scontrol", "requeue", job_id]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.strip() if done.returncode else ""
