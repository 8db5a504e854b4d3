"""The batch script of a job: what it asks sbatch for, and the srun that starts its tasks."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from launch.cluster_file import Cluster
from launch.slurm.raw_logs import START_MARK, batch_log
from launch.slurm.requeue import REQUEUE_FILE
from launch.slurm.task_place import LEFT_OUT

SIGNAL_DELAY_S = 60  # from USR2 to the time limit; SLURM may be some seconds late
# srun gets its size from this job, whatever variables of another job it inherits. It runs in the
# background because bash acts on a signal only between commands or while it waits: a job may ask
# for its signal to go to the batch shell alone (B:USR2@60), which passes it on to the tasks.
STEP = """\
log={folder}/"${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
echo "{start_mark} ${{SLURM_RESTART_COUNT:-0}}"
if command -v scontrol > /dev/null; then export {requeue_file}="${{log}}_requeue"; fi
rm -f "${{log}}_requeue" "${{log}}_bad_nodes"
nodes=$SLURM_JOB_NUM_NODES; without=()
{preflight}\
srun --unbuffered --output="${{log}}_%t_log.out" --error="${{log}}_%t_log.err" --export=ALL \
"${{without[@]}}" --nodes="$nodes" --ntasks=$((nodes * {tasks})) --mem=0 \
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
# A step of a rank per GPU before the run. Where it cannot write which nodes are bad, it has failed.
PREFLIGHT = """\
healthy=
srun --export=ALL --kill-on-bad-exit=1 --nodes="$nodes" --ntasks=$((nodes * {gpus})) --mem=0 \
--ntasks-per-node={gpus} --cpus-per-task={cpus} --cpu-bind=cores \
{command} --bad-nodes "${{log}}_bad_nodes" && healthy=1
[ -e "${{log}}_bad_nodes" ] || {{ echo "error: the preflight found no answer"; exit 1; }}
"""
STOP_AT_BAD_NODES = """\
[ "$healthy" ] || exit 1
"""
LEAVE_OUT_BAD_NODES = """\
bad=$(wc -l < "${{log}}_bad_nodes")
nodes=$((nodes - bad))
[ "$nodes" -gt 0 ] || {{ echo "error: the preflight left no node"; exit 1; }}
[ "$nodes" -le {most} ] || nodes={most}
export {left_out}="$(paste -sd, "${{log}}_bad_nodes")"
if [ "${left_out}" ]; then without=(--exclude="${left_out}"); fi
"""


def step_script(cluster: Cluster, folder: Path, python: Sequence[object]) -> str:
    """Return the lines that run submitit in each task, with raw logs in `folder`.

    `python` are the words before a module's name.
    """
    tasks = tasks_per_node(cluster)
    command = [*python, "submitit.core._submit", folder]
    return STEP.format(
        preflight=_preflight_script(cluster, python),
        folder=shlex.quote(str(folder)),
        requeue_file=REQUEUE_FILE,
        start_mark=START_MARK,
        tasks=tasks,
        cpus=_node_cpus(cluster) // tasks,
        command=shlex.join(map(str, command)),
    )


def _preflight_script(cluster: Cluster, python: Sequence[object]) -> str:
    if not (cluster.preflight or cluster.spares):
        return ""
    command = shlex.join(map(str, [*python, *preflight_words(cluster)]))
    text = PREFLIGHT + (LEAVE_OUT_BAD_NODES if cluster.spares else STOP_AT_BAD_NODES)
    return text.format(
        gpus=cluster.gpus_per_node,
        cpus=cluster.cpus_per_gpu,
        command=command,
        most=cluster.max_nodes,
        left_out=LEFT_OUT,
    )


def preflight_words(cluster: Cluster) -> list[str]:
    """Return the words of `harness preflight` for this cluster's data, folder and device."""
    words = ["harness", "preflight", "--folder", str(Path(cluster.folder).absolute())]
    if "data_root" in cluster.run.model_fields_set:
        words += ["--data", str(Path(cluster.run.data_root).absolute())]
    return [*words, "--device", cluster.run.device]


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
    extra: dict[str, object] = {"nodes": cluster.asked_nodes, "output": log, "error": log}
    extra["requeue" if cluster.requeues else "no-requeue"] = True
    if cluster.min_nodes < cluster.max_nodes:
        extra["spread-job"] = True  # as many of them as are free
    for option, value in (("partition", cluster.partition), ("account", cluster.account)):
        if value is not None:
            extra[option] = value
    if cluster.gpus_by_gres is None:
        extra["gpus-per-node"] = cluster.gpus_option
    if after:
        extra |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    options = {key.replace("_", "-"): value for key, value in cluster.sbatch.items()}
    parameters: dict[str, object] = {
        "job_name": name,
        "nodes": cluster.max_nodes + cluster.spares,
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
