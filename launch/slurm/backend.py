"""SLURM as a launcher."""

from __future__ import annotations

from pathlib import Path

from harness.errors import FINISHED, STOPPED, UserError
from harness.outcome import State, recorded_state
from launch.backend import Request, RunState, Stage, Submission
from launch.records import Record, read_status
from launch.slurm.scontrol import CANNOT_WRITE, WAITING, Job, cancel, find_job


class SlurmBackend:
    """Submits runs as jobs; a study is an array."""

    def submit(self, request: Request) -> Submission:
        """Submit the runs as one job, or as one array where they are several."""
        from launch.slurm.submission import submit  # imports PyTorch, which `status` does not need

        return submit(request)

    def preview(self, request: Request) -> str:
        """Return the script for sbatch."""
        from launch.slurm.submission import make_executor

        return make_executor(request).script(len(request.runs))

    def state(self, record: Record) -> RunState | None:
        """Return what SLURM says of the run's job."""
        job = find_job(record.job_id)
        if job is None:
            return None  # SLURM has forgotten it
        if job.active:
            return _active_state(record, job)
        if job.state == "CANCELLED":
            return RunState(Stage.CANCELLED, _why_cancelled(record, job), job.restarts)
        if job.exit_signal == 0 and job.exit_code in (FINISHED, STOPPED):
            return None
        reason = f"{job.state}, and it wrote no log"
        if job.exit_signal == CANNOT_WRITE:
            folder = Path(record.log).parent
            reason = f"{job.nodes} cannot write {folder}: set folder in the cluster file"
        return RunState(Stage.FAILED, reason, job.restarts)

    def cancel(self, record: Record) -> None:
        """Cancel the job; its ranks get a TERM and stop with a checkpoint."""
        if failure := cancel(record.job_id):
            raise UserError(f"job {record.job_id}: not cancelled: {failure}")


def _active_state(record: Record, job: Job) -> RunState:
    if job.state in WAITING:
        return RunState(Stage.QUEUED, job.reason if job.reason != "None" else "", job.restarts)
    status = read_status(Path(record.run))
    if recorded_state(status) is State.RUNNING and status["heartbeat"] > job.started_s:
        return RunState(Stage.RUNNING, f"on {job.nodes}", job.restarts)
    stage = Stage.ENDING if job.state == "COMPLETING" else Stage.STARTING
    return RunState(stage, f"on {job.nodes}", job.restarts)


def _why_cancelled(record: Record, job: Job) -> str:
    if record.after is not None and job.nodes in ("", "(null)"):
        return f"job {record.after}, which it waited for, did not succeed"
    return "by scancel; submit it again to resume"
