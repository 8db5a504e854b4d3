"""The raw logs of a job, read for what srun, slurmd or Python said of its end."""

from __future__ import annotations

import re
from pathlib import Path

from launch.run_output import tail

START_MARK = "=== start"  # the batch script writes it at each start of the job
# srun's lines. It also names the tasks that it ended itself ("Terminated") or that failed.
LOST = re.compile(r"srun: error: (\S+): tasks? (\S+): (.*)")
NOT_THE_CAUSE = re.compile(r"Terminated|Exited with exit code")
BY_SLURM = re.compile(r"(?:slurmstepd\S*|srun): error: \*\*\* .* AT \S+ (DUE TO .*) \*\*\*")
COMPLAINT = re.compile(r"(\w+: )?(error|fatal): |\w+(Error|Exception): |.*: command not found")


def batch_log(folder: Path, job_id: str) -> Path:
    """Return the log of the batch script and of srun; `job_id` is 15 or, in an array, 12_3."""
    return folder / f"{job_id}_batch.log"


def killed_task(folder: Path, job_id: str) -> str:
    """Return what ended the job's last start from outside: a killed task, or SLURM; else ""."""
    for line in _last_start(tail(batch_log(folder, job_id))):
        lost, by_slurm = LOST.match(line), BY_SLURM.match(line)
        if lost and not NOT_THE_CAUSE.match(lost[3]):
            return f"{lost[1]}: task {lost[2]}: {lost[3]}"
        if by_slurm:
            return f"SLURM ended the job {by_slurm[1].lower()}"
    return ""


def last_complaint(folder: Path, job_id: str) -> str:
    """Return the last error that a task, or the batch script, wrote before it ended."""
    tasks = sorted(folder.glob(f"{job_id}_*_log.err"))[:8]  # they mostly fail alike
    for path in (*tasks, batch_log(folder, job_id)):
        complaints = [line for line in _last_start(tail(path)) if COMPLAINT.match(line)]
        if complaints:
            return complaints[-1]
    return ""


def _last_start(lines: list[str]) -> list[str]:
    marks = [i for i, line in enumerate(lines) if line.startswith(START_MARK)]
    return lines[marks[-1] + 1 :] if marks else lines
