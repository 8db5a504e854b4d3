"""The state of a run as SLURM and its folder tell it; what SLURM says is written by hand here."""

import json
from dataclasses import replace

import pytest

import launch.slurm.backend
from launch.backend import Stage
from launch.records import Record
from launch.slurm.scontrol import Job
from launch.status import state_of

RUNNING = Job("RUNNING", "None", 1, False, "n[1-2]", 100.0, 0, 0)
ENDED = replace(RUNNING, state="COMPLETED")


@pytest.fixture
def state(tmp_path, monkeypatch):
    """Returns a run's state for a job, a status.json and a log."""

    def state_for(job, status=None, log="", **record):
        monkeypatch.setattr(launch.slurm.backend, "find_job", lambda job_id: job)
        (tmp_path / "run").mkdir(exist_ok=True)
        if status is not None:
            (tmp_path / "run" / "status.json").write_text(json.dumps(status))
        (tmp_path / "run.log").write_text(log)
        names = "run", str(tmp_path / "run"), "c.yaml", str(tmp_path / "run.log"), "7", 3
        return state_of(Record(*names, **record))

    return state_for


STOPPED = {"state": "stopped", "reason": "stopped after step 7 of 9"}


@pytest.mark.parametrize(
    ("job", "status", "stage", "reason"),
    [
        (replace(RUNNING, state="PENDING", reason="Priority"), None, Stage.QUEUED, "Priority"),
        (replace(RUNNING, state="REQUEUED"), STOPPED, Stage.QUEUED, ""),
        (RUNNING, None, Stage.STARTING, "on n[1-2]"),
        (RUNNING, STOPPED, Stage.STARTING, "on n[1-2]"),
        # the heartbeat of an earlier start, then one of this start
        (RUNNING, {"state": "running", "heartbeat": 99.0}, Stage.STARTING, "on n[1-2]"),
        (RUNNING, {"state": "running", "heartbeat": 101.0}, Stage.RUNNING, "on n[1-2]"),
        (replace(RUNNING, state="COMPLETING"), STOPPED, Stage.ENDING, "on n[1-2]"),
        (replace(ENDED, state="CANCELLED"), STOPPED, Stage.CANCELLED, "by scancel"),
        (ENDED, STOPPED, Stage.STOPPED, "stopped after step 7 of 9; submit it again to resume"),
        (replace(ENDED, exit_code=75), STOPPED, Stage.STOPPED, "submit it again"),
        (None, STOPPED, Stage.STOPPED, "submit it again"),
        (replace(ENDED, state="FAILED", exit_code=1), STOPPED, Stage.FAILED, "it wrote no log"),
        (replace(ENDED, exit_signal=53), None, Stage.FAILED, "set folder in the cluster file"),
        (None, {"state": "running", "heartbeat": 9.0}, Stage.FAILED, "no job is known"),
    ],
)
def test_the_state_of_a_run(state, job, status, stage, reason):
    found = state(job, status)
    assert found.stage is stage and reason in found.reason


def test_a_failed_run_shows_the_last_line_of_its_log(state):
    failed = replace(ENDED, state="FAILED", exit_code=1)
    assert state(failed, STOPPED, "first\nerror: n1: no GPU\n\n").reason == "error: n1: no GPU"


def test_a_job_whose_teacher_failed_says_so(state):
    found = state(replace(ENDED, state="CANCELLED", nodes="(null)"), after="6")
    assert found.reason == "job 6, which it waited for, did not succeed"
