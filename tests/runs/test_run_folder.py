"""The status of a run, kept by a thread beside the loop."""

import json

import pytest

from harness import load_config
from harness.outcome import State
from harness.runs.run_folder import Fenced, RunFolder
from tests.faults import wait_for


@pytest.fixture
def folder(small, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(load_config(small()), {})
    folder.write_status(State.RUNNING, step=0)
    return folder


def test_what_the_loop_reports_is_written_by_the_heartbeat(folder):
    status = folder.path / "status.json"
    before = status.read_bytes()
    folder.report(step=20)
    assert status.read_bytes() == before, "the loop itself touched the disk"
    with folder.heartbeat(lambda why: None):
        folder.report(step=40)
        wait_for(lambda: json.loads(status.read_text())["step"] == 40, "the status of step 40")
    folder.report(step=60)
    folder.write_status(State.STOPPED, reason="asked to")
    ended = json.loads(status.read_text())
    assert (ended["state"], ended["step"], ended["reason"]) == ("stopped", 60, "asked to")


def test_the_loop_notices_that_another_incarnation_took_over(folder):
    status = folder.path / "status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"incarnation": 2}))
    with pytest.raises(Fenced, match="incarnation 2 took over; 1 ends here"):
        folder.report(step=20)
