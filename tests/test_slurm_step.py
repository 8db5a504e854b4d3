import subprocess
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from harness import slurm_step
from harness.errors import UserError
from harness.slurm_step import (
    check_not_in_step_shell,
    cpus_of_task,
    ended_local_tasks,
    rendezvous_port,
    step_id,
    unused_tasks,
    use_slurm_rendezvous,
)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("n1", "n1"), ("n[01-04,7],m3", "n01"), ("gpu-a,gpu-b", "gpu-a"), ("r[3]-ib", "r3-ib")],
)
def test_slurm_rendezvous_is_on_the_first_node(nodelist, host):
    environment = {"SLURM_STEP_NODELIST": nodelist, "SLURM_JOB_ID": "123456"}
    use_slurm_rendezvous(environment)
    assert environment["MASTER_ADDR"] == host
    assert environment["MASTER_PORT"] == "23456"  # 20000 + 123456 mod 20000


def test_slurm_rendezvous_never_overwrites():
    environment = {"SLURM_STEP_NODELIST": "n1", "MASTER_ADDR": "head", "MASTER_PORT": "1"}
    use_slurm_rendezvous(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("head", "1")


def test_steps_of_one_job_and_jobs_that_run_side_by_side_have_ports_of_their_own():
    """Two srun commands in one allocation, and the jobs submitted before and after it."""
    ports = [
        rendezvous_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        for job in range(5000, 5100)
        for step in range(8)
    ]
    assert len(set(ports)) == len(ports)
    assert all(20000 <= port < 40000 for port in ports)


def test_tasks_of_a_job_before_it_was_requeued_belong_to_another_launch():
    first = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}
    assert step_id(first) == "7.1"
    assert step_id(first | {"SLURM_RESTART_COUNT": "2"}) == "7.1 after 2 requeues"


def task_processes(step, ranks):
    """Sleeping processes that are tasks of a step, as srun would start them."""
    names = {"SLURM_JOB_ID": "98765432", "SLURM_STEP_ID": step}
    return [
        subprocess.Popen(["sleep", "60"], env=names | {"SLURM_PROCID": str(rank)}) for rank in ranks
    ]


def test_tasks_of_this_node_that_have_ended_are_counted(monkeypatch):
    monkeypatch.setattr(slurm_step, "_sees_slurmstepd", lambda: True)
    environment = {"SLURM_JOB_ID": "98765432", "SLURM_STEP_ID": "3", "SLURM_NODEID": "1"}
    environment |= {"SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2,3"}
    tasks = task_processes("3", [2, 3, 4, 4]) + task_processes("4", [0])  # a child; another step
    try:
        assert ended_local_tasks(environment) == 0
        tasks[1].kill()
        tasks[1].wait()
        assert ended_local_tasks(environment) == 1
        # where slurmstepd is invisible, as in a container, the other tasks may be so too
        monkeypatch.setattr(slurm_step, "_sees_slurmstepd", lambda: False)
        assert ended_local_tasks(environment) == 0
    finally:
        for task in tasks:
            task.kill()
            task.wait()


@pytest.mark.parametrize(
    ("changes", "terminal", "refused"),
    [
        ({}, True, True),
        ({}, False, False),  # a step that was started from the terminal
        ({"SLURM_STEP_NUM_TASKS": "1"}, True, False),
        ({"RANK": "0"}, True, False),  # torchrun starts its own ranks
    ],
)
def test_a_terminal_of_srun_is_one_task_of_several(monkeypatch, changes, terminal, refused):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: terminal))
    environment = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PTY_PORT": "37483"} | changes
    expected = "3 of the 4 tasks .* are missing.*put `srun --overlap` before"
    with pytest.raises(UserError, match=expected) if refused else nullcontext():
        check_not_in_step_shell(environment)


def test_one_rank_in_an_allocation_of_several_tasks_gets_a_hint():
    assert "1 rank in a job of 8 tasks" in unused_tasks({"SLURM_NTASKS": "8"})
    for names in ({}, {"SLURM_NTASKS": "1"}, {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}):
        assert unused_tasks(names) == ""
    assert unused_tasks({"SLURM_NTASKS": "8", "RANK": "0"}) == ""


def test_a_task_of_srun_loads_by_its_own_cpus():
    names = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_CPUS_PER_TASK": "12"}
    assert cpus_of_task(names) == 12
    assert cpus_of_task(names | {"RANK": "0"}) is None  # torchrun's ranks share them
    assert cpus_of_task({"SLURM_CPUS_PER_TASK": "12"}) is None  # a batch script
    assert cpus_of_task({"SLURM_STEP_NUM_TASKS": "8"}) is None
