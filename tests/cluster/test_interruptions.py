"""Whatever ends a job, the run goes on to the weights of the uninterrupted one."""

import os
import signal
import socket

import pytest

from tests.cluster.conftest import only

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600, func_only=True)]


def expect_no_step_twice(log, seen):
    """It went on from a checkpoint written at the stop: at the step it had come to, or later."""
    resume = only("resume", log)
    assert resume["step"] >= seen
    return resume


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_scancel_with_a_signal(launch, straight, launcher):
    job = launch.submit(launcher=launcher, requeues=1)
    seen = launch.wait_for_step(50)
    launch.cluster.command("scancel", "--signal=USR2", job)
    launch.wait_for_state(job, "COMPLETED")
    expect_no_step_twice(launch.expect_straight(straight, starts=2), seen)
    assert "--- requeued, 1 of at most 1 times" in launch.log


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_scontrol_requeue(launch, straight, launcher):
    job = launch.submit(launcher=launcher)
    seen = launch.wait_for_step(50)
    launch.cluster.command("scontrol", "requeue", job)
    launch.wait_for_state(job, "COMPLETED")
    expect_no_step_twice(launch.expect_straight(straight, starts=2), seen)


def test_time_limit(launch, straight):
    """Of one minute; SLURM looks every half minute whose signal is due. Frozen, the run waits."""
    early = {"signal": "USR2@45"}
    job = launch.submit(nodes=1, timeout_min=1, sbatch=early, requeues=1)

    def signalled():
        return "--- SIGUSR2: stopping" in launch.log

    launch.wait("a step", lambda: signalled() or launch.status().get("step", 0) > 0)
    if not signalled():
        rank = launch.signal_rank(0, signal.SIGSTOP)
        launch.wait("SLURM's signal", signalled)
        os.kill(rank, signal.SIGCONT)
    launch.wait("its requeue", lambda: "--- requeued, 1 of at most 1 times" in launch.log)
    launch.cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    launch.wait_for_state(job, "COMPLETED")
    expect_no_step_twice(launch.expect_straight(straight, starts=2), 1)


@pytest.mark.parametrize("parameters", ["", "preempt_send_user_signal"])
def test_preemption(launch, straight, parameters):
    launch.cluster.configure(SlurmctldParameters=parameters)
    job = launch.submit(requeues=1)
    seen = launch.wait_for_step(50)
    other = ("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true")
    launch.cluster.command("sbatch", *other)
    launch.wait_for_state(job, "COMPLETED")
    expect_no_step_twice(launch.expect_straight(straight, starts=2), seen)


def test_a_node_set_down_and_the_run_goes_on_with_fewer(launch, straight):
    job = launch.submit(nodes="1-4")
    seen = launch.wait_for_step(50)
    assert launch.job(job)["NodeList"] == "n[1-4]"
    launch.cluster.command("scontrol", "update", "nodename=n[3-4]", "state=down", "reason=test")
    try:
        launch.wait_for_state(job, "COMPLETED")
    finally:
        launch.cluster.command("scontrol", "update", "nodename=n[3-4]", "state=resume")
    log = launch.expect_straight(straight, starts=2)
    assert expect_no_step_twice(log, seen)["world_size"] == 2


def test_scancel_ends_it_for_good_and_submit_goes_on(launch, straight):
    job = launch.submit()
    seen = launch.wait_for_step(50)
    launch.cluster.command("scancel", job)
    launch.wait_for_state(job, "CANCELLED")
    assert launch.job(job)["Restarts"] == "0"
    assert launch.status()["state"] == "stopped"
    assert " cancelled " in launch("status", launch.run).stdout
    second = launch.submit()
    launch.wait_for_state(second, "COMPLETED")
    expect_no_step_twice(launch.expect_straight(straight, starts=2), seen)


def test_requeues_are_counted(launch):
    job = launch.submit(requeues=0)
    launch.wait_for_step(50)
    launch.cluster.command("scancel", "--signal=USR1", job)
    launch.wait_for_state(job, "FAILED")
    assert launch.job(job)["ExitCode"] == "75:0"
    assert "requeues: 0 are used up; submit it again" in launch.log
    assert " stopped " in launch("status", launch.run).stdout


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_ends_the_job_and_is_named(launch, rank):
    job = launch.submit()
    launch.wait_for_step(50)
    nodes = launch.cluster.command("scontrol", "show", "hostnames", launch.job(job)["NodeList"])
    launch.signal_rank(rank, signal.SIGKILL)
    launch.wait_for_state(job, "FAILED")
    node = nodes.split()[rank]
    assert f"{node}, rank {rank}: ended by SIGKILL (out of memory?)" in launch.log
    (row,) = launch("status", launch.run).stdout.splitlines()[1:]
    assert row.split()[2] == "failed"


def test_a_dead_rank_is_no_stop_where_srun_is_faster_than_the_news(launch):
    """srun sends TERM to all ranks when one has failed; that is no reason to requeue the job."""
    job = launch.submit()
    launch.wait_for_step(50)
    first = launch.signal_rank(0, signal.SIGSTOP)
    launch.signal_rank(1, signal.SIGKILL)
    launch.wait("srun's signal", lambda: "--- SIGTERM: stopping" in launch.log)
    os.kill(first, signal.SIGCONT)
    launch.wait_for_state(job, "FAILED")
    assert launch.job(job)["Restarts"] == "0"
    assert "rank 1: ended by SIGKILL (out of memory?)" in launch.log
    (row,) = launch("status", launch.run).stdout.splitlines()[1:]
    assert row.split()[2] == "failed"


def test_a_hung_rank_ends_the_job_and_is_named(launch):
    job = launch.submit("run.hang_timeout_s=10")
    launch.wait_for_step(50)
    launch.signal_rank(1, signal.SIGSTOP)
    launch.wait_for_state(job, "FAILED")
    assert f"rank 1 on {socket.gethostname()}" in launch.log  # every node here has that name
    assert "failed" in launch("status", launch.run).stdout


def test_torchrun_starts_a_dead_rank_again_in_its_place(launch, straight):
    """Frozen, rank 0 does not fail too: the agents then count a different number of restarts."""
    job = launch.submit(launcher="torchrun")
    launch.wait_for_step(50)
    first = launch.signal_rank(0, signal.SIGSTOP)
    launch.signal_rank(1, signal.SIGKILL)
    launch.wait("the agent's signal", lambda: "closing signal SIGTERM" in launch.log)
    os.kill(first, signal.SIGCONT)
    launch.wait_for_state(job, "COMPLETED")
    launch.expect_straight(straight, starts=1)  # of the job
    assert launch.status()["incarnation"] == 2
