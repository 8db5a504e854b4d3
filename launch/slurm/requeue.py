"""The decision to requeue a job, from what is known at the end of a task."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from harness.errors import FINISHED, STOPPED, USER_ERROR
from harness.outcome import Outcome, State
from launch.slurm.scontrol import Job

USER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)  # the time limit, preemption, scancel --signal
# The variable that names the file by which a task without scontrol has the batch script requeue the
# job. The batch script sets it only where it has scontrol itself.
REQUEUE_FILE = "HARNESS_REQUEUE_FILE"


class Decision(Enum):
    """The possible decisions."""

    FINISH = "the run is finished"
    LEAVE_TO_LEADER = "another task of the job decides"
    LEAVE_TO_SLURM = "SLURM requeues the job itself, or a user cancelled it"
    REQUEUE = "put the job back into the queue"
    LEAVE_TO_BATCH_SCRIPT = "the batch script puts the job back into the queue"
    NO_REQUEUE_LEFT = "the job was requeued as often as allowed"
    UNKNOWN_JOB = "SLURM does not know the job"
    NO_CLIENTS = "no command of SLURM is there to requeue the job with"
    FAIL = "the run failed"


class Requeuer(Enum):
    """What puts a job back into the queue: whichever has SLURM's commands."""

    TASK = "the leader's task"
    BATCH_SCRIPT = "the batch script, after the last task"
    NOBODY = "neither has them"


@dataclass(frozen=True)
class TaskEnd:
    """The end of a task's rank, or of torchrun's agent.

    `exit_code` is negative for the signal that killed it. `signal` is the first one that the task
    received. `outcome` is that of this start of the run, None where it recorded none.
    """

    exit_code: int
    signal: signal.Signals | None
    outcome: Outcome | None
    leader: bool
    restarts: int
    requeues: int
    requeuer: Requeuer = Requeuer.TASK


def decide(end: TaskEnd, find_job: Callable[[], Job | None]) -> Decision:
    """Decide by the task's end and, where that is not enough, by what SLURM says of the job."""
    outcome = end.outcome
    stopped = outcome is not None and outcome.state is State.STOPPED
    if end.exit_code == FINISHED and not stopped:
        return Decision.FINISH
    # ranks of torchrun end with 0 when they stop, as it would restart them otherwise
    asked_to_stop = end.exit_code in (STOPPED, FINISHED)
    if asked_to_stop and not end.leader:
        return Decision.LEAVE_TO_LEADER  # any other exit code makes srun kill the leader
    if end.exit_code != USER_ERROR:
        agreed = outcome is not None and stopped and outcome.agreed_by_all_ranks
        if end.signal == signal.SIGTERM and not agreed:
            asked_to_stop = _is_slurms(find_job())
        elif end.signal in USER_SIGNALS:
            asked_to_stop = True  # also where no checkpoint came of it
    if not asked_to_stop:
        return Decision.FAIL
    return _requeue(end, find_job) if end.leader else Decision.LEAVE_TO_LEADER


def _is_slurms(job: Job | None) -> bool:
    """Return True if a TERM came from SLURM, False if from srun, which ends all ranks if one fails.

    SLURM's comes with a preemption, or with a change of the job's state.
    """
    return job is not None and (job.preempted or job.state != "RUNNING")


def _requeue(end: TaskEnd, find_job: Callable[[], Job | None]) -> Decision:
    if end.requeuer is Requeuer.TASK:
        job = find_job()
        if job is None:
            return Decision.UNKNOWN_JOB
        if job.state != "RUNNING":
            return Decision.LEAVE_TO_SLURM
    if end.requeuer is Requeuer.NOBODY:
        return Decision.NO_CLIENTS
    if end.restarts >= end.requeues:
        return Decision.NO_REQUEUE_LEFT
    by_task = end.requeuer is Requeuer.TASK
    return Decision.REQUEUE if by_task else Decision.LEAVE_TO_BATCH_SCRIPT
