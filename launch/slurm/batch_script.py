"""The batch script of a job: what it asks sbatch for, and the srun that starts its tasks."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from launch.cluster_file import Cluster
from launch.slurm.raw_logs import START_MARK, batch_log
from launch.slurm.requeue import REQUEUE_FILE

SIGNAL_DELAY_S = 60  # from USR2 to the time limit; SLURM may be some seconds late
# srun gets its size from this job, whatever variables of another job it inherits. It runs in the
# background because bash acts on a signal only between commands or while it waits: a job may ask
# for its signal to go to the batch shell alone (B:USR2@60), which passes it on to the tasks.
STEP = """\
log={folder}/"${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
echo "{start_mark} ${{SLURM_RESTART_COUNT:-0}}"
if command -v scontrol > /dev/null; then export {requeue_file}="${{log}}_requeue"; fi
rm -f "${{log}}_requeue"
srun --unbuffered --output="${{log}}_%t_log.out" --error="${{log}}_%t_log.err" --export=ALL \
--nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((SLURM_JOB_NUM_NODES * {tasks})) --mem=0 \
--kill-on-bad-exit=1 --ntasks-per-node={tasks} --cpus-per-task={cpus} --cpu-bind=cores {command} &
step=$!
for name in USR1 USR2; do trap "signalled=1; kill -$name $step" $name; done
signalled=1
while [ "$signalled" ]; do signalled=; wait "$step" && code=0 || code=$?; done
if [ -e "${{log}}_requeue" ]; then
    rm "${{log}}_requeue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def step_script(cluster: Cluster, folder: Path, command: Sequence[object]) -> str:
    """Return the lines that run `command` in each task, with raw logs in `folder`."""
    tasks = tasks_per_node(cluster)
    return STEP.format(
        folder=shlex.quote(str(folder)),
        requeue_file=REQUEUE_FILE,
        start_mark=START_MARK,
        tasks=tasks,
        cpus=_node_cpus(cluster) // tasks,
        command=shlex.join(map(str, command)),
    )


def tasks_per_node(cluster: Cluster) -> int:
    """Return the number of srun's tasks: one per GPU, or torchrun's agent alone."""
    return 1 if cluster.launcher == "torchrun" else cluster.gpus_per_node


def sbatch_parameters(
    cluster: Cluster, folder: Path, name: str, runs: int, after: str, at_once: int | None
) -> dict[str, object]:
    """Return submitit's parameters for a job, or an array of `runs` jobs.

    `folder` takes the batch script's own log. `after` are the jobs to wait for, as in 3:4.
    """
    # sbatch takes whole nodes as tasks, as a number of tasks would cap a range of nodes at its
    # lower end; srun then starts the tasks
    log = batch_log(folder, "%A_%a" if runs > 1 else "%j")
    extra: dict[str, object] = {"nodes": cluster.nodes, "output": log, "error": log}
    extra["requeue" if cluster.requeues else "no-requeue"] = True
    if cluster.min_nodes < cluster.max_nodes:
        extra["spread-job"] = True  # as many of them as are free
    for option, value in (("partition", cluster.partition), ("account", cluster.account)):
        if value is not None:
            extra[option] = value
    if cluster.gpus_by_gres is None:
        kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
        extra["gpus-per-node"] = f"{kind}{cluster.gpus_per_node}"
    if after:
        extra |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    options = {key.replace("_", "-"): value for key, value in cluster.sbatch.items()}
    parameters: dict[str, object] = {
        "job_name": name,
        "nodes": cluster.max_nodes,
        "cpus_per_task": _node_cpus(cluster),
        "time": cluster.timeout_min,
        "setup": list(cluster.setup),
        "signal_delay_s": SIGNAL_DELAY_S,
        "wckey": None,  # submitit's own default is one that clusters with wckeys do not know
        "additional_parameters": extra | options,
        "use_srun": False,  # the script's command contains it
    }
    if cluster.mem_gb is not None:
        parameters["mem"] = f"{round(cluster.mem_gb * 1024)}M"
    if at_once is not None:
        parameters["array_parallelism"] = at_once
    return parameters


def _node_cpus(cluster: Cluster) -> int:
    return cluster.cpus_per_gpu * cluster.gpus_per_node
