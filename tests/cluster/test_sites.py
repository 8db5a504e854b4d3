"""What real sites set: interactive jobs, environments, signals, nodes without SLURM's commands."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import COMMAND_S, only
from tests.cluster.throwaway import search_path

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600, func_only=True)]


def srun(launch, *words, **variables):
    names = {"SLURM_CONF": str(launch.cluster.conf), "PATH": search_path()}
    environment = os.environ | names | variables
    command = ["srun", "--partition=low", "--time=5", *map(str, words)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=COMMAND_S
    )


def test_submitted_from_inside_a_job_whose_site_exports_nothing(launch, straight):
    """The job would inherit one task and another kind of memory; its folder is awkward, too."""
    launch.runs = launch.folder / "a b#c,d"
    launch.run = launch.runs / "small"
    launch.mapping |= {"folder": str(launch.runs), "mem_gb": 2, "gpus_per_node": 2}
    launch.file.write_text(yaml.safe_dump(launch.mapping))
    interactive = ("--nodes=1", "--ntasks=1", "--cpus-per-task=2", "--mem-per-cpu=500")
    submit = (sys.executable, "-m", "launch", "submit", launch.config, "--cluster", launch.file)
    done = srun(launch, *interactive, *submit, "--wait", SBATCH_EXPORT="NONE")
    assert done.returncode == 0, done.stdout + done.stderr
    assert only("start", launch.expect_straight(straight, starts=1))["world_size"] == 4


def test_a_signal_to_the_batch_shell_where_the_nodes_have_no_scontrol(launch):
    # for the tasks, not for the batch script; exec, as the script signals the process it starts
    hidden = 'srun() { local real; real=$(type -P srun); PATH=/nowhere exec "$real" "$@"; }'
    job = launch.submit(setup=[hidden], sbatch={"signal": "B:USR2@60"}, requeues=1)
    assert launch.wait_for_step(50)
    assert "--- no scontrol here: the batch script requeues the job" in launch.log
    launch.cluster.command("scancel", "--batch", "--signal=USR2", job)
    launch.wait("its requeue", lambda: launch.job(job)["Restarts"] == "1")
    assert launch.status()["checkpoint_written"] is True
    assert "--- the batch script requeues, 1 of 1 times" in launch.log


def test_a_killed_task_is_named(launch):
    job = launch.submit()
    launch.wait_for_step(50)
    node = launch.cluster.command("scontrol", "show", "hostnames", launch.job(job)["NodeList"])
    os.kill(task_process(launch, rank=1), signal.SIGKILL)
    launch.wait("its requeue", lambda: launch.job(job)["Restarts"] == "1")
    row = launch("status", launch.run).stdout.splitlines()[1]
    assert f"{node.split()[1]}: task 1: Killed" in row


def task_process(launch, rank):
    """The process of submitit's task, the harness's parent."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().decode().split("\0")
            names = (process / "environ").read_bytes().decode().split("\0")
            task = "submitit.core._submit" in words and str(launch.runs) in " ".join(words)
            if task and f"SLURM_PROCID={rank}" in names:
                return int(process.name)
    raise AssertionError(f"no task of rank {rank}")


def test_a_task_that_is_left_alone_in_its_step_says_what_to_type(launch):
    train = f"{sys.executable} -m harness train {launch.config} --out {launch.run}"
    alone = f"[ $SLURM_PROCID = 0 ] || exit 0; {train} run.hang_timeout_s=200"
    step = ("--nodes=1", "--ntasks=2", "--mem=2000", "--kill-on-bad-exit=0")
    done = srun(launch, *step, "bash", "-c", alone)
    assert done.returncode == 1
    assert "1 of this job step's tasks" in done.stderr and "srun --overlap" in done.stderr
