"""How runs end, as values: what exceptions carry and status.json holds."""

import json

import pytest

from harness.config.loading import load_config
from harness.errors import UserError
from harness.outcome import Outcome, RunFailed, State, Stopped
from harness.resilience.grace import GRACE_S, KILL_WAIT_S, grace_s, kill_after_s
from harness.training.setup import train


def test_status_json_holds_the_outcome():
    outcome = Outcome(State.STOPPED, "stopped after step 7 of 9", 7, True, True)
    status = {"state": "stopped", "total_steps": 9, **outcome.as_status()}
    assert Outcome.from_status(json.loads(json.dumps(status))) == outcome
    suddenly = Outcome(State.FAILED, "lost rank 1")
    # the step of the last heartbeat stays
    assert {"step": 5, **suddenly.as_status()}["step"] == 5


@pytest.mark.parametrize("state", ["running", "starting", "", None])
def test_a_run_that_has_not_ended_has_no_outcome(state):
    assert Outcome.from_status({"state": state, "step": 3}) is None
    assert Outcome.from_status({}) is None


def test_the_status_of_an_older_version_still_reads():
    stopped = Outcome.from_status({"state": "stopped", "step": 7, "reason": "stopped after step 7"})
    assert stopped == Outcome(State.STOPPED, "stopped after step 7", 7, False, False)
    finished = Outcome.from_status({"state": "finished", "step": 9, "error": 1.0})
    assert finished == Outcome(State.FINISHED, "", 9, True, True)


def test_exceptions_carry_the_outcome():
    stopped = Stopped("s", step=3, checkpoint_written=True, agreed_by_all_ranks=True)
    assert stopped.outcome == Outcome(State.STOPPED, "s", 3, True, True)
    assert str(stopped) == "s"
    assert RunFailed("f").outcome == Outcome(State.FAILED, "f")


def test_a_finished_run_records_its_outcome(small, tmp_path):
    result = train(load_config(small()), tmp_path / "run")
    status = json.loads((result.folder / "status.json").read_text())
    assert Outcome.from_status(status) == Outcome(State.FINISHED, "", 15, True, True)
    assert status["total_steps"] == 15


def test_launchers_kill_after_the_ranks_grace_time_and_before_slurm_does():
    assert grace_s({}) == GRACE_S == 20.0  # as docs/cluster.md says
    assert kill_after_s({}) == 27.0
    # time to requeue the job remains
    assert KILL_WAIT_S - kill_after_s({}) >= 3.0
    assert kill_after_s({"HARNESS_GRACE_S": "60"}) == 67.0


@pytest.mark.parametrize("text", ["", "soon", "-1", "0", "nan", "inf"])
def test_a_grace_time_that_is_no_time_is_refused(text):
    with pytest.raises(UserError, match=f"HARNESS_GRACE_S={text}: give seconds"):
        grace_s({"HARNESS_GRACE_S": text})
