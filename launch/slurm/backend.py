"""Submitting runs to SLURM, through submitit."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from harness.atomic_file import write_atomically
from harness.config.loading import dump_config
from harness.errors import UserError
from launch.records import Record, read_records, records_folder, write_records
from launch.run_spec import RunSpec
from launch.slurm.cluster_file import Cluster
from launch.slurm.code_copy import CodeCopy
from launch.slurm.job_step import Task
from launch.slurm.scontrol import find_job

SIGNAL_DELAY_S = 60  # USR2 comes so long before the time limit; SLURM may be some seconds late
SAID = re.compile(r"^sbatch: (error: )?(Batch job submission failed: )?")
SBATCH_PATIENCE_S = 30  # sbatch itself tries for two minutes where the queue is full


class Executor(submitit.SlurmExecutor):
    """submitit's, which writes its script where there is no SLURM too (--dry-run).

    `code`: the copy of the code that the jobs start from.
    """

    def __init__(self, folder: Path, max_num_timeout: int, code: CodeCopy | None) -> None:
        super().__init__(folder, max_num_timeout=max_num_timeout)
        self.code = code

    @property
    def _submitit_command_str(self) -> str:
        if self.code is None:
            return super()._submitit_command_str
        words = [sys.executable, "-u", self.code.folder, "submitit.core._submit", self.folder]
        return shlex.join(map(str, words))

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, runs: int = 1) -> str:
        """What would be handed to sbatch; an array where the runs are several."""
        if runs > 1:
            self.parameters["map_count"] = runs
        return self._make_submission_file_text(self._submitit_command_str, "")


def active_job(target: Path, name: str) -> str | None:
    """The job that still has this run: waiting or running."""
    record = read_records(target).get(name)
    job = find_job(record.job_id) if record else None
    return record.job_id if record and job and job.active else None


def executor(
    cluster: Cluster, target: Path, after: str | None = None, at_once: int | None = None
) -> Executor:
    """`after`: start when that job has succeeded; `at_once`: so many runs of an array."""
    # sbatch takes whole nodes as tasks, as a number of tasks would cap a range of nodes at its
    # lower end; srun then starts a task a GPU, or an agent a node, which starts the ranks
    tasks = 1 if cluster.launcher == "torchrun" else cluster.gpus_per_node
    node_cpus = cluster.cpus_per_gpu * cluster.gpus_per_node
    extra: dict[str, Any] = {"nodes": cluster.nodes, "requeue": cluster.requeues > 0 or None}
    if cluster.min_nodes < cluster.max_nodes:
        extra["spread-job"] = True  # as many of them as are free
    extra |= {"partition": cluster.partition, "account": cluster.account}
    if after is not None:
        extra |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    extra = {key: value for key, value in extra.items() if value is not None}
    if not cluster.requeues:
        extra["no-requeue"] = True
    options = {key.replace("_", "-"): value for key, value in cluster.sbatch.items()}
    parameters: dict[str, Any] = {
        "job_name": target.name,
        "nodes": cluster.max_nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "cpus_per_task": node_cpus,
        "time": cluster.timeout_min,
        "setup": list(cluster.setup),
        "signal_delay_s": SIGNAL_DELAY_S,
        "additional_parameters": extra | options,
        "srun_args": [
            *("--kill-on-bad-exit=1", f"--ntasks-per-node={tasks}"),
            *(f"--cpus-per-task={node_cpus // tasks}", "--cpu-bind=cores"),
        ],
    }
    if cluster.mem_gb is not None:
        parameters["mem"] = f"{round(cluster.mem_gb * 1024)}M"
    if at_once is not None:
        parameters["array_parallelism"] = at_once
    # submitit's own limit never decides: the task counts the requeues
    records = records_folder(target)
    code = CodeCopy.of_this_code(records) if cluster.freeze else None
    made = Executor(records, max_num_timeout=max(cluster.requeues, 1), code=code)
    made.update_parameters(**parameters)
    return made


def submit(
    cluster: Cluster,
    target: Path,
    wanted: Sequence[RunSpec],
    after: str | None = None,
    at_once: int | None = None,
) -> list[Record]:
    """Submits the runs of `target` as one job, or as one array where they are several.

    Raises UserError where a folder cannot be written or SLURM refuses.
    """
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on PATH; submit from a login node (docs/cluster.md)")
    array = executor(cluster, target, after, at_once)
    if array.code is not None:
        array.code.write()
    code = str(array.code.folder) if array.code else None
    tasks = [_task(cluster, target, one, code) for one in wanted]
    with _whole(), _one_line_errors(), _patience():
        jobs = array.submit_array(tasks)
        records = [
            Record(
                *(one.name, str(one.run), task.arguments[0], task.log, job.job_id),
                *(cluster.requeues, after, None, code),
            )
            for one, task, job in zip(wanted, tasks, jobs, strict=True)
        ]
        write_records(target, records)
    return records


def _task(cluster: Cluster, target: Path, wanted: RunSpec, code: str | None) -> Task:
    """Freezes the config: what is queued does not change with the file."""
    folder = records_folder(target).absolute()
    config, log = folder / f"{wanted.name}.yaml", folder / f"{wanted.name}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(config, dump_config(wanted.config).encode())
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error.strerror}; take another folder"
        ) from None
    return Task(
        arguments=(str(config), *wanted.typed, "--out", str(wanted.run.absolute()), "--resume"),
        run=str(wanted.run.absolute()),
        log=str(log),
        launcher=cluster.launcher,
        min_nodes=cluster.min_nodes,
        gpus_per_node=cluster.gpus_per_node,
        requeues=cluster.requeues,
        environment={"OMP_NUM_THREADS": str(cluster.cpus_per_gpu)} | cluster.environment,
        code=code,
    )


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """sbatch's complaint as a UserError."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints it too
            yield
    except (FailedJobError, TimeoutError) as error:
        if isinstance(error, TimeoutError) or isinstance(error.__cause__, TimeoutError):
            silent = f"no answer in {SBATCH_PATIENCE_S} s: the queue is full, or slurmctld is away"
            raise UserError(f"sbatch: {silent} (see squeue, scontrol ping)") from None
        lines = [SAID.sub("", line) for line in str(error).splitlines()]
        raise UserError(f"sbatch: {'; '.join(lines)}; nothing was submitted") from None


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Ctrl-C waits until what sbatch has taken is written down: no job without a record."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, give_up)
    timer = signal.setitimer(signal.ITIMER_REAL, SBATCH_PATIENCE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)  # whoever had set one gets it back
        signal.signal(signal.SIGALRM, previous)
