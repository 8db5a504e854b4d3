"""The decision to requeue, over the whole table of signals, outcomes and states of the job.

The expected decisions were written down by hand from docs/cluster.md.
"""

import signal
from itertools import product

import pytest

from harness.errors import FAILED, FINISHED, STOPPED, USER_ERROR
from harness.outcome import Outcome, State
from launch.slurm.requeue import Decision, Requeuer, TaskEnd, decide
from launch.slurm.scontrol import Job

TERM, USR1, USR2 = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2

# how the rank of this task ended: its exit code, and the outcome that the run recorded
AGREED = (STOPPED, Outcome(State.STOPPED, "r", 7, True, True))
NO_CHECKPOINT = (STOPPED, Outcome(State.STOPPED, "r", 7, False, True))
GRACE_OVER = (STOPPED, Outcome(State.STOPPED, "r"))  # the watchdog's end: no step ended in time
BEFORE_STEP_0 = (STOPPED, None)
TORCHRUN_STOPPED = (FINISHED, Outcome(State.STOPPED, "r", 7, True, True))
DONE = (FINISHED, Outcome(State.FINISHED, "", 9, True, True))
BROKEN = (FAILED, Outcome(State.FAILED, "r", 7))
LOST_PEER = (FAILED, None)
KILLED = (-9, None)
MISTAKE = (USER_ERROR, None)


def job(state, preempted=False):
    return Job(state, "None", 0, preempted, "n1", 0.0, 0, 0)


# what SLURM says of the job when it is asked
JOBS = {
    "running": job("RUNNING"),
    "preempted": job("RUNNING", preempted=True),
    "completing": job("COMPLETING"),
    "cancelled": job("CANCELLED"),
    "unknown": None,
}
R, S, U, F = (
    Decision.REQUEUE,
    Decision.LEAVE_TO_SLURM,
    Decision.UNKNOWN_JOB,
    Decision.FAIL,
)
STOPPED_BY_ITSELF = dict(running=R, preempted=R, completing=S, cancelled=S, unknown=U)
# a TERM without the ranks' agreement is srun's, after another rank's failure, unless SLURM has
# something in mind for the job
PERHAPS_SRUNS = dict(running=F, preempted=R, completing=S, cancelled=S, unknown=F)
ALWAYS_FAILS = dict.fromkeys(JOBS, F)
ALWAYS_FINISHED = dict.fromkeys(JOBS, Decision.FINISH)
TABLE = {
    (None, AGREED): STOPPED_BY_ITSELF,
    (None, NO_CHECKPOINT): STOPPED_BY_ITSELF,
    (None, GRACE_OVER): STOPPED_BY_ITSELF,
    (None, BEFORE_STEP_0): STOPPED_BY_ITSELF,
    (None, TORCHRUN_STOPPED): STOPPED_BY_ITSELF,
    (None, DONE): ALWAYS_FINISHED,
    (None, BROKEN): ALWAYS_FAILS,
    (None, LOST_PEER): ALWAYS_FAILS,
    (None, KILLED): ALWAYS_FAILS,
    (None, MISTAKE): ALWAYS_FAILS,
    (TERM, AGREED): STOPPED_BY_ITSELF,
    (TERM, NO_CHECKPOINT): STOPPED_BY_ITSELF,
    (TERM, GRACE_OVER): PERHAPS_SRUNS,
    (TERM, BEFORE_STEP_0): PERHAPS_SRUNS,
    (TERM, TORCHRUN_STOPPED): STOPPED_BY_ITSELF,
    (TERM, DONE): ALWAYS_FINISHED,
    (TERM, BROKEN): PERHAPS_SRUNS,
    (TERM, LOST_PEER): PERHAPS_SRUNS,
    (TERM, KILLED): PERHAPS_SRUNS,
    (TERM, MISTAKE): ALWAYS_FAILS,
}
for user_signal in (USR1, USR2):  # the time limit or a preemption: whatever became of the run
    TABLE |= {
        (user_signal, AGREED): STOPPED_BY_ITSELF,
        (user_signal, NO_CHECKPOINT): STOPPED_BY_ITSELF,
        (user_signal, GRACE_OVER): STOPPED_BY_ITSELF,
        (user_signal, BEFORE_STEP_0): STOPPED_BY_ITSELF,
        (user_signal, TORCHRUN_STOPPED): STOPPED_BY_ITSELF,
        (user_signal, DONE): ALWAYS_FINISHED,
        (user_signal, BROKEN): STOPPED_BY_ITSELF,
        (user_signal, LOST_PEER): STOPPED_BY_ITSELF,
        (user_signal, KILLED): STOPPED_BY_ITSELF,
        (user_signal, MISTAKE): ALWAYS_FAILS,
    }


def decision(number, end, found, leader=True, restarts=0, requeues=3):
    code, outcome = end
    return decide(TaskEnd(code, number, outcome, leader, restarts, requeues), lambda: found)


def test_the_table_is_complete():
    ends = [AGREED, NO_CHECKPOINT, GRACE_OVER, BEFORE_STEP_0, TORCHRUN_STOPPED]
    ends += [DONE, BROKEN, LOST_PEER, KILLED, MISTAKE]
    assert set(TABLE) == set(product((None, TERM, USR1, USR2), ends))
    assert all(row.keys() == JOBS.keys() for row in TABLE.values())


@pytest.mark.parametrize("state", JOBS)
@pytest.mark.parametrize(("number", "end"), TABLE)
def test_the_leader_decides_by_the_table(number, end, state):
    assert decision(number, end, JOBS[state]) is TABLE[number, end][state]


@pytest.mark.parametrize("state", JOBS)
@pytest.mark.parametrize(("number", "end"), TABLE)
def test_other_tasks_fail_or_leave_it_to_the_leader(number, end, state):
    """srun kills the other tasks when one exits with an error, so only a failure may be one."""
    found = decision(number, end, JOBS[state], leader=False)
    of_leader = TABLE[number, end][state]
    if end[0] == STOPPED or end == TORCHRUN_STOPPED:
        assert found is Decision.LEAVE_TO_LEADER
    elif of_leader in (Decision.FAIL, Decision.FINISH):
        assert found is of_leader
    else:
        assert found is Decision.LEAVE_TO_LEADER


@pytest.mark.parametrize(("restarts", "expected"), [(2, R), (3, Decision.NO_REQUEUE_LEFT)])
def test_the_number_of_requeues_is_limited(restarts, expected):
    assert decision(USR2, AGREED, JOBS["running"], restarts=restarts) is expected


@pytest.mark.parametrize(
    ("requeuer", "restarts", "expected"),
    [
        (Requeuer.BATCH_SCRIPT, 0, Decision.LEAVE_TO_BATCH_SCRIPT),
        (Requeuer.BATCH_SCRIPT, 3, Decision.NO_REQUEUE_LEFT),
        (Requeuer.NOBODY, 0, Decision.NO_CLIENTS),
    ],
)
@pytest.mark.parametrize("number", [TERM, USR2])
def test_without_slurms_commands_the_batch_script_requeues(number, requeuer, restarts, expected):
    end = TaskEnd(*AGREED[:1], number, AGREED[1], True, restarts, 3, requeuer)
    assert decide(end, lambda: None) is expected
    broken = TaskEnd(*BROKEN[:1], TERM, BROKEN[1], True, restarts, 3, requeuer)
    assert decide(broken, lambda: None) is Decision.FAIL


def test_slurm_is_not_asked_where_its_answer_would_not_matter():
    """Hundreds of tasks that ask at the same time are a burden on slurmctld."""

    def never():
        raise AssertionError("asked")

    for code, outcome in (DONE, MISTAKE):
        decide(TaskEnd(code, TERM, outcome, True, 0, 3), never)
    decide(TaskEnd(*AGREED[:1], TERM, AGREED[1], False, 0, 3), never)
