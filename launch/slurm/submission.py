"""The submission of runs to SLURM, through submitit."""

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

import submitit
from submitit.core.utils import FailedJobError

from harness.errors import UserError
from harness.plug_ins import all_modules
from launch.backend import Request, Submission
from launch.cluster_file import Cluster
from launch.records import Record, records_folder, write_records
from launch.run_spec import FrozenRun, RunSpec
from launch.slurm.code_copy import CodeCopy
from launch.slurm.job_step import Task

SIGNAL_DELAY_S = 60  # from USR2 to the time limit; SLURM may be some seconds late
SAID = re.compile(r"^sbatch: (error: )?(Batch job submission failed: )?")
SBATCH_PATIENCE_S = 30  # sbatch itself tries for two minutes where the queue is full


class Executor(submitit.SlurmExecutor):
    """submitit's executor, which can write its script without SLURM, too (--dry-run).

    `code` is the copy of the code that the jobs start from.
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
        """Return the script for sbatch; an array where the runs are several."""
        if runs > 1:
            self.parameters["map_count"] = runs
        return self._make_submission_file_text(self._submitit_command_str, "")


def submit(request: Request) -> Submission:
    """Submit the runs as one job, or as one array where they are several.

    Raises UserError where a folder cannot be written or SLURM refuses.
    """
    cluster, target, runs = request.cluster, request.target, request.runs
    assert cluster is not None
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on PATH; submit from a login node (docs/cluster.md)")
    executor = make_executor(request)
    if executor.code is not None:
        executor.code.write()
    code = str(executor.code.folder) if executor.code else None
    frozen = [run.freeze(target, "slurm") for run in runs]
    tasks = [_task(cluster, *pair, code) for pair in zip(runs, frozen, strict=True)]
    with _whole(), _one_line_errors(), _patience():
        jobs = executor.submit_array(tasks)
        records = [
            Record(
                *(run.name, str(run.run), str(files.config), str(files.log), job.job_id),
                *(cluster.requeues, _job_ids(request.after) or None, None, code),
            )
            for run, files, job in zip(runs, frozen, jobs, strict=True)
        ]
        write_records(target, records)
    return Submission(records)


def make_executor(request: Request) -> Executor:
    """Return submitit's executor with everything set that the script for sbatch is made of."""
    cluster = request.cluster
    assert cluster is not None
    # Each job starts from a copy of the code, that of the packages that its runs use included.
    plug_ins = {module for run in request.runs for module in all_modules(run.config)}
    records = records_folder(request.target)
    code = CodeCopy.of_this_code(records, tuple(sorted(plug_ins))) if cluster.freeze else None
    # submitit's own limit never decides: the task counts the requeues
    executor = Executor(records, max_num_timeout=max(cluster.requeues, 1), code=code)
    after = _job_ids(request.after)
    executor.update_parameters(**_parameters(cluster, request.target, after, request.at_once))
    return executor


def _job_ids(after: Sequence[Record]) -> str:
    return ":".join(record.job_id for record in after)


def _parameters(
    cluster: Cluster, target: Path, after: str, at_once: int | None
) -> dict[str, object]:
    # sbatch takes whole nodes as tasks, as a number of tasks would cap a range of nodes at its
    # lower end; srun then starts a task per GPU, or an agent per node, which starts the ranks
    tasks = 1 if cluster.launcher == "torchrun" else cluster.gpus_per_node
    node_cpus = cluster.cpus_per_gpu * cluster.gpus_per_node
    extra: dict[str, object] = {"nodes": cluster.nodes}
    extra["requeue" if cluster.requeues else "no-requeue"] = True
    if cluster.min_nodes < cluster.max_nodes:
        extra["spread-job"] = True  # as many of them as are free
    for option, value in (("partition", cluster.partition), ("account", cluster.account)):
        if value is not None:
            extra[option] = value
    if after:
        extra |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    options = {key.replace("_", "-"): value for key, value in cluster.sbatch.items()}
    parameters: dict[str, object] = {
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
    return parameters


def _task(cluster: Cluster, run: RunSpec, frozen: FrozenRun, code: str | None) -> Task:
    return Task(
        arguments=frozen.arguments,
        run=str(run.run.absolute()),
        log=str(frozen.log),
        launcher=cluster.launcher,
        min_nodes=cluster.min_nodes,
        gpus_per_node=cluster.gpus_per_node,
        requeues=cluster.requeues,
        environment={"OMP_NUM_THREADS": str(cluster.cpus_per_gpu)} | cluster.environment,
        code=code,
    )


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Raise sbatch's complaint as a UserError."""
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
    """Have Ctrl-C wait until accepted jobs are recorded, so that no job is without a record."""
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
        signal.setitimer(signal.ITIMER_REAL, *timer)  # restore an outer one
        signal.signal(signal.SIGALRM, previous)
