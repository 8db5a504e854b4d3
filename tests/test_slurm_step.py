import pytest

from harness.slurm_step import rendezvous_port, step_id, use_slurm_rendezvous


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
