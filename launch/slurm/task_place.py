"""The place of a task within its job."""

from __future__ import annotations

import os
import shutil
import socket
import time

from harness.slurm_step import rendezvous_port
from launch.slurm.requeue import REQUEUE_FILE, Requeuer

LEFT_OUT = "HARNESS_LEFT_OUT"  # the variable with the nodes that a run with spares goes without


class TaskPlace:
    """The place of this task within its job, by SLURM's variables."""

    def __init__(self, launcher: str) -> None:
        from submitit.slurm.slurm import SlurmJobEnvironment

        job = SlurmJobEnvironment()
        self.raw_job_id, self.job_id = job.raw_job_id, job.job_id  # 15 and, in an array, 12_3
        self.left_out = os.environ.get(LEFT_OUT, "")  # by the preflight
        self.nodes, self.rank = job.num_nodes, job.global_rank
        if LEFT_OUT in os.environ:
            self.nodes = int(os.environ["SLURM_STEP_NUM_NODES"])
        self.tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", job.num_tasks))
        self.host = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.port = rendezvous_port(os.environ)
        # torchrun sorts its agents by name: rank 0 is on the first one in that order
        self.first_host = min(job.hostnames)
        by_torchrun = launcher == "torchrun"
        self.leader = self.host == self.first_host if by_torchrun else self.rank == 0
        self.name = f"{self.host}" if by_torchrun else f"{self.host}, rank {self.rank}"
        self.requeue_file = os.environ.get(REQUEUE_FILE)
        self.requeuer = Requeuer.TASK
        if shutil.which("scontrol") is None:  # as in most containers
            self.requeuer = Requeuer.BATCH_SCRIPT if self.requeue_file else Requeuer.NOBODY

    def describe(self, requeues: int) -> str:
        start = f"start {self.restarts + 1} of at most {requeues + 1}"
        nodes = os.environ.get("SLURM_STEP_NODELIST", self.host)
        return f"job {self.job_id}, {start}, on {nodes}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
