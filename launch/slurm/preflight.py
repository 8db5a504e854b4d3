"""The preflight by itself: srun waits for nodes, measures on them and gives them back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from harness.errors import UserError
from launch.cluster_file import Cluster
from launch.slurm.batch_script import preflight_words
from launch.slurm.submission_environment import outside_any_job

# sbatch's options that srun does not take, or that mean nothing without a batch script
ONLY_SBATCH = ("signal", "export", "get-user-env", "hold", "mail-type", "mail-user")
LONGEST_MIN = 5


def run_preflight(cluster: Cluster, as_json: bool) -> int:
    """Run `harness preflight` on the cluster's nodes; return its exit code.

    Raises UserError where there is no srun.
    """
    if shutil.which("srun") is None:
        raise UserError("srun is not on PATH; start it on a login node (docs/cluster.md)")
    with outside_any_job():
        environment = cluster.environment | dict(os.environ)
        return subprocess.run(srun_command(cluster, as_json), env=environment).returncode


def srun_command(cluster: Cluster, as_json: bool) -> list[str]:
    """Return srun with a rank per GPU of the cluster file's nodes."""
    nodes = cluster.max_nodes + cluster.spares
    options = {
        "job-name": "preflight",
        "nodes": nodes,
        "ntasks": nodes * cluster.gpus_per_node,
        "ntasks-per-node": cluster.gpus_per_node,
        "cpus-per-task": cluster.cpus_per_gpu,
        "cpu-bind": "cores",
        "time": min(cluster.timeout_min, LONGEST_MIN),
        "partition": cluster.partition,
        "account": cluster.account,
        "mem": None if cluster.mem_gb is None else f"{round(cluster.mem_gb * 1024)}M",
        "gpus-per-node": cluster.gpus_option if cluster.gpus_by_gres is None else None,
        "kill-on-bad-exit": 1,
    }
    options |= {
        option: value
        for key, value in cluster.sbatch.items()
        if (option := key.replace("_", "-")) not in ONLY_SBATCH
    }
    words = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in options.items()
        if value is not None
    ]
    json = ["--json"] if as_json else []
    python = [sys.executable, "-u", "-m", *preflight_words(cluster), *json]
    setup = "\n".join([*cluster.setup, 'exec "$@"'])
    return ["srun", *words, "bash", "-c", setup, "bash", *python]
