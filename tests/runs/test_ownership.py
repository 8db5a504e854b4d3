"""Whose run folder it is, whatever clocks, host names and process numbers say."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from harness import UserError, load_config
from harness.atomic_file import write_atomically
from harness.outcome import State, Stopped
from harness.resilience.stopping import StopRequest
from harness.runs import ownership as run_ownership
from harness.runs import process_identity
from harness.runs.checkpoint import checkpoint_path, save_checkpoint
from harness.runs.ownership import Fenced, Launch
from harness.runs.process_identity import ProcessIdentity
from harness.runs.run_folder import RunFolder

HERE = ProcessIdentity.of(os.getpid())
OWNER = """
import os, sys, time
from pathlib import Path
from harness import load_config
from harness.runs import ownership as run_ownership
from harness.runs import run_folder
from harness.resilience.stopping import StopRequest
run_folder.HEARTBEAT_S = run_folder.NEWS_S = 0.2
run_ownership.WATCH_S = 2.0
folder = run_folder.RunFolder(Path(sys.argv[1]))
folder.ownership.wait_until_free(StopRequest())
folder.open(load_config(sys.argv[2]), {})
folder.write_status(run_folder.State.RUNNING)
with folder.heartbeat(print):
    print("running", os.getpid(), time.time(), flush=True)
    sys.stdin.read()
"""


def can_make_containers() -> bool:
    """Whether this process may make a pid namespace with a /proc of its own; a chroot may not."""
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "true"]
    found = shutil.which("unshare") is not None
    return found and subprocess.run(container, capture_output=True).returncode == 0


needs_namespaces = pytest.mark.skipif(
    not can_make_containers(), reason="pid namespaces with a /proc of their own need root"
)
needs_faketime = pytest.mark.skipif(
    shutil.which("faketime") is None, reason="apt install faketime shifts clocks"
)


def run_here(folder: Path, small) -> RunFolder:
    """A run of this process that beats no more, as if it had been killed."""
    run = RunFolder(folder)
    run.open(load_config(small()), {})
    run.write_status(State.RUNNING, step=7)
    return run


def change_status(folder: Path, **values) -> None:
    status = folder / "status.json"
    write_atomically(status, json.dumps(json.loads(status.read_text()) | values).encode())


@pytest.fixture
def another_boot(tmp_path, monkeypatch):
    """From now on this process takes itself for one of another machine of the same name."""
    (tmp_path / "boot_id").write_text("another boot\n")
    monkeypatch.setattr(process_identity, "BOOT_ID", tmp_path / "boot_id")


@pytest.fixture
def watch(monkeypatch):
    monkeypatch.setattr(run_ownership, "WATCH_S", 0.6)
    monkeypatch.setattr(run_ownership, "POLL_S", 0.05)


def take_over(folder: Path, small) -> int:
    """Incarnation of a process that finds the folder free; raises UserError where it does not."""
    run = RunFolder(folder)
    run.ownership.wait_until_free(StopRequest())
    run.open(load_config(small()), {})
    return run.incarnation


def test_what_proves_that_a_process_has_ended():
    child = subprocess.Popen(["sleep", "100"])
    identity = ProcessIdentity.of(child.pid)
    assert not identity.has_ended()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert identity.has_ended(), "a zombie, which nobody has waited for, has ended"
    child.wait()
    assert identity.has_ended()
    for unknown in ("boot_id", "pid_namespace"):
        assert not replace(identity, **{unknown: None}).has_ended()
        assert not replace(identity, **{unknown: "another"}).has_ended()
    assert not HERE.has_ended()
    assert replace(HERE, started_ticks=HERE.started_ticks - 1).has_ended(), "its number came again"
    assert not replace(HERE, started_ticks=None).has_ended()
    assert ProcessIdentity.recorded(HERE.as_record()) == HERE


def test_started_ticks_are_those_of_the_kernel():
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    child = subprocess.Popen(["sleep", "100"])
    started_s = ProcessIdentity.of(child.pid).started_ticks / os.sysconf("SC_CLK_TCK")
    child.kill()
    child.wait()
    assert uptime_s - 1 < started_s < uptime_s + 10


@pytest.mark.parametrize("clock_s", [-3600, 3600])
def test_an_owner_that_does_not_beat_is_watched_and_then_followed(
    small, tmp_path, another_boot, watch, capsys, clock_s
):
    run_here(tmp_path / "run", small)
    change_status(tmp_path / "run", boot_id="yet another", heartbeat=time.time() + clock_s)
    begun_s = time.monotonic()
    assert take_over(tmp_path / "run", small) == 2
    assert time.monotonic() - begun_s > run_ownership.WATCH_S
    (line,) = capsys.readouterr().out.splitlines()
    assert f"waiting up to 1 s to see whether {HERE} is still running it" in line


def test_a_status_of_an_older_version_is_watched_too(small, tmp_path, watch):
    run_here(tmp_path / "run", small)
    status = tmp_path / "run" / "status.json"
    new = ("boot_id", "pid_namespace", "started_ticks", "token", "beats")
    old = {k: v for k, v in json.loads(status.read_text()).items() if k not in new}
    status.write_text(json.dumps(old))
    assert take_over(tmp_path / "run", small) == 2


@contextmanager
def beating(folder: Path, **values):
    """Another process' heartbeat, whose clock stands still."""
    ended = threading.Event()

    def beat():
        for beats in count():
            if ended.wait(0.1):
                return
            change_status(folder, beats=beats, heartbeat=0, **values)

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    ended.set()
    thread.join()


def test_an_owner_that_beats_keeps_the_folder(small, tmp_path, another_boot, watch):
    run_here(tmp_path / "run", small)
    before = sorted((tmp_path / "run").rglob("*"))
    with (
        beating(tmp_path / "run", boot_id="yet another"),
        pytest.raises(UserError, match=f"in use by process {os.getpid()} on {HERE.host}"),
    ):
        take_over(tmp_path / "run", small)
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_an_owner_that_stops_while_it_is_watched_leaves_the_folder(small, tmp_path, watch):
    run_here(tmp_path / "run", small)
    with beating(tmp_path / "run", boot_id="another", state="stopped"):
        begun_s = time.monotonic()
        run = RunFolder(tmp_path / "run")
        run.ownership.wait_until_free(StopRequest())
        assert time.monotonic() - begun_s < run_ownership.WATCH_S


def test_a_signal_ends_the_wait(small, tmp_path, another_boot):
    run_here(tmp_path / "run", small)
    stop = StopRequest()
    stop.signal = 15
    with pytest.raises(Stopped, match="nothing was written"):
        RunFolder(tmp_path / "run").ownership.wait_until_free(stop)


def test_a_full_disk_does_not_make_a_run_look_dead(small, tmp_path, monkeypatch):
    run = run_here(tmp_path / "run", small)
    os.utime(run.path / "status.json", (0, 0))

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("harness.runs.run_folder.write_atomically", full)
    before = run.ownership._signs()
    assert not run.write_status(State.RUNNING)
    assert run.ownership._signs() != before


@pytest.mark.parametrize("claim", ["", "{", '{"host": "node7", "pid": 1, "boot_id": "another"}'])
def test_a_claim_of_a_process_that_died_before_its_first_status(small, tmp_path, watch, claim):
    run = run_here(tmp_path / "run", small)
    run.write_status(State.STOPPED)
    (run.path / ".incarnation-002").write_text(claim)
    assert take_over(run.path, small) == 3


def test_the_number_goes_on_where_small_files_were_lost(small, tmp_path):
    """A checkpoint of a lower incarnation would pass for older than those that it continues."""
    run = run_here(tmp_path / "run", small)
    save_checkpoint(checkpoint_path(run.checkpoints, 4, 20), {"step": 20, "x": torch.ones(1)})
    for path in [run.path / "status.json", *run.path.glob(".incarnation-*")]:
        path.unlink()
    assert take_over(run.path, small) == 5


def test_checkpoints_without_a_config_are_not_started_over(small, tmp_path):
    run = run_here(tmp_path / "run", small)
    run.write_status(State.STOPPED)
    save_checkpoint(checkpoint_path(run.checkpoints, 1, 20), {"step": 20})
    (run.path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"its config\.yaml is missing"):
        RunFolder(run.path).check(load_config(small()), True, set())


def test_a_run_whose_folder_was_made_again_does_not_write_into_the_new_one(small, tmp_path):
    old = run_here(tmp_path / "run", small)
    shutil.rmtree(old.path)
    new = RunFolder(old.path)
    new.open(load_config(small()), {})
    with pytest.raises(Fenced, match="another run was started in its place"):
        old.write_status(State.RUNNING)  # before the new one has written its first status
    assert new.write_status(State.RUNNING) and new.read_status()["token"] == new.ownership.token
    for claim in new.path.glob(".incarnation-*"):
        claim.unlink()  # hidden files that somebody removed
    assert new.write_status(State.RUNNING)
    with pytest.raises(Fenced):
        old.write_status(State.RUNNING)


def test_agents_of_equal_host_and_number_are_different_launches(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    launches = []
    for boot in ("one", "another"):
        agent = ProcessIdentity("node", 1, boot, "pid:[1]", 100)
        monkeypatch.setattr(ProcessIdentity, "of", lambda pid, agent=agent: agent)
        launches.append(Launch.from_environment())
    record = {"launch": launches[0].id, "requeues": 0}
    assert launches[0].follows(record) and not launches[1].follows(record)


@contextmanager
def owner(folder: Path, config: Path, *before: str, **environment: str):
    """A process that has opened the folder and beats; yields it and the line that says so."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", OWNER, str(folder), str(config)],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("running"):
            break
    try:
        yield process, seen
    finally:
        process.kill()
        process.communicate()


@needs_faketime
@pytest.mark.parametrize("hours", [-1, 1])
def test_a_live_run_whose_clock_is_an_hour_off_keeps_its_folder(
    small, tmp_path, another_boot, monkeypatch, hours
):
    """On another machine of the same name. Killed, it is followed after the wait, not an hour."""
    shifted = ["faketime", "--exclude-monotonic", "-f", f"{hours:+d}h"]
    folder = tmp_path / "run"
    with owner(folder, small(), *shifted) as (_, seen):
        clock_s = float(seen[-1].split()[2])
        assert clock_s - time.time() == pytest.approx(3600 * hours, abs=60)
        with pytest.raises(UserError, match="in use by process"):
            take_over(folder, small)
    monkeypatch.setattr(run_ownership, "WATCH_S", 0.6)
    assert take_over(folder, small) == 2


@needs_namespaces
def test_containers_whose_runs_are_all_process_1(small, tmp_path):
    """Of one host, one boot and one host name; the first of them lives, then is killed."""
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    folder, config = tmp_path / "run", small()
    with owner(folder, config, *container) as (_, seen):
        assert seen[-1].split()[1] == "1"
        # without --mount-proc, so that its /proc shows another process 1 than the one it means
        with owner(folder, config, *container[:-1]) as (second, refused):
            assert second.wait(60) != 0
        assert "in use by process 1 on" in refused[-1]
        status = json.loads((folder / "status.json").read_text())
        assert (status["pid"], status["boot_id"]) == (1, HERE.boot_id)
        assert not ProcessIdentity.recorded(status).has_ended(), "process 1 is another one here"
    with owner(folder, config, *container) as (_, seen):
        assert "waiting up to 2 s to see whether process 1 on" in seen[0]
        assert json.loads((folder / "status.json").read_text())["incarnation"] == 2
