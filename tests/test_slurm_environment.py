"""A run under SLURM's variables alone, as srun sets them for the tasks of two nodes."""

import os
import subprocess
import sys

from harness.runs.logging.jsonl import read_log
from tests.conftest import free_port


def slurm_environment(task: int, port: int) -> dict[str, str]:
    """Task 0 is alone on the first node, tasks 1 and 2 share the second one."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER"))}
    return kept | {
        "SLURM_JOB_ID": str(port - 20000),  # the rendezvous port is 20000 + job id
        "SLURM_PROCID": str(task),
        "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_NODEID": str(min(task, 1)),
        "SLURM_LOCALID": str(max(task - 1, 0)),
        "SLURM_STEP_TASKS_PER_NODE": "1,2",
        "SLURM_STEP_NODELIST": "localhost,localhost",
    }


def test_three_tasks_of_srun_train_together(small, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "harness", "train", str(small())]
    tasks = [
        subprocess.Popen(
            [*command, "--out", str(tmp_path / "run")],
            env=slurm_environment(task, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in range(3)
    ]
    outputs = [task.communicate() for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], outputs
    assert outputs[0][0].splitlines()[-3].startswith("error ")
    assert outputs[1][0] == outputs[2][0] == ""
    start = read_log(tmp_path / "run" / "log.jsonl")[0]
    assert (start["event"], start["world_size"]) == ("start", 3)
