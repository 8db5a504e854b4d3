"""SLURM as a launcher."""

from __future__ import annotations

from pathlib import Path

from harness.errors import FINISHED, STOPPED, UserError
from harness.outcome import State, recorded_state
from launch.backend import Request, RunState, Stage, Submission
from launch.records import Record, read_outcome, read_status
from launch.run_output import tail
from launch.slurm.notes import StartNotes
from launch.slurm.raw_logs import killed_task, last_complaint
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
        if job is None:  # SLURM has forgotten it
            cause = "" if read_outcome(Path(record.run)) else _killed(record)
            return RunState(Stage.FAILED, cause) if cause else None
        if job.active:
            return _active_state(record, job)
        if job.state == "CANCELLED":
            return RunState(Stage.CANCELLED, _why_cancelled(record, job), job.restarts)
        if job.exit_signal == 0 and job.exit_code in (FINISHED, STOPPED):
            return None
        return RunState(Stage.FAILED, _why_failed(record, job), job.restarts)

    def cancel(self, record: Record) -> None:
        """Cancel the job; its ranks get a TERM and stop with a checkpoint."""
        if failure := cancel(record.job_id):
            raise UserError(f"job {record.job_id}: not cancelled: {failure}")


def _active_state(record: Record, job: Job) -> RunState:
    before = _cause(record, job.restarts - 1) if job.restarts else ""
    before = f"; start {job.restarts} ended: {before}" if before else ""
    if job.state in WAITING:
        reason = job.reason if job.reason != "None" else ""
        return RunState(Stage.QUEUED, f"{reason}{before}", job.restarts)
    status = read_status(Path(record.run))
    if recorded_state(status) is State.RUNNING and status["heartbeat"] > job.started_s:
        return RunState(Stage.RUNNING, f"on {job.nodes}{before}", job.restarts)
    stage = Stage.ENDING if job.state == "COMPLETING" else Stage.STARTING
    return RunState(stage, f"on {job.nodes}{before}", job.restarts)


def _why_cancelled(record: Record, job: Job) -> str:
    if record.after is not None and job.nodes in ("", "(null)"):
        return f"job {record.after}, which it waited for, did not succeed"
    return "by scancel; submit it again to resume"


def _why_failed(record: Record, job: Job) -> str:
    """Return why a job failed, from whichever log has it: the tasks', srun's or Python's."""
    folder = Path(record.log).parent
    if job.exit_signal == CANNOT_WRITE:
        return f"{job.nodes} cannot write {folder}: set folder in the cluster file"
    lines = [line for line in tail(Path(record.log)) if line.strip()] or [""]
    found = _cause(record, job.restarts) or _killed(record)
    found = found or last_complaint(folder, record.job_id) or lines[-1]
    if not found:
        return f"{job.state}, and it wrote no log"
    return found if job.state == "FAILED" else f"{found} ({job.state})"


def _cause(record: Record, restarts: int) -> str:
    return StartNotes(Path(record.log), record.job_id, restarts).cause()


def _killed(record: Record) -> str:
    return killed_task(Path(record.log).parent, record.job_id)
