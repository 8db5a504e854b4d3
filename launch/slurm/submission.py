"""The submission of runs to SLURM, through submitit."""

from __future__ import annotations

import contextlib
import io
import re
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
from launch.slurm.batch_script import sbatch_parameters, step_script
from launch.slurm.code_copy import CodeCopy
from launch.slurm.job_step import Task
from launch.slurm.submission_environment import check_sbatch_variables, outside_any_job

SAID = re.compile(r"^sbatch: (error: )?(Batch job submission failed: )?")
SBATCH_PATIENCE_S = 30  # sbatch itself tries for two minutes where the queue is full


class Executor(submitit.SlurmExecutor):
    """submitit's executor with the cluster file's srun.

    It can write its script without SLURM, too (--dry-run). `code` is the copy of the code that the
    jobs start from.
    """

    def __init__(self, folder: Path, cluster: Cluster, code: CodeCopy | None) -> None:
        # submitit's own limit never decides: the task counts the requeues
        super().__init__(folder, max_num_timeout=max(cluster.requeues, 1))
        self.cluster, self.code = cluster, code

    @property
    def _submitit_command_str(self) -> str:
        start = "-m" if self.code is None else self.code.folder
        return step_script(self.cluster, self.folder, [sys.executable, "-u", start])

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
    with _whole(), _one_line_errors(), _patience(), outside_any_job():
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
    """Return submitit's executor with everything set that the script for sbatch is made of.

    Raises UserError where a variable of this shell would override the script, or SLURM could not
    write the logs.
    """
    cluster = request.cluster
    assert cluster is not None
    # Each job starts from a copy of the code, that of the packages that its runs use included.
    plug_ins = {module for run in request.runs for module in all_modules(run.config)}
    records = records_folder(request.target).absolute()
    if "%" in str(records):
        raise UserError(f"{records}: SLURM reads % in a path as a pattern; take another folder")
    code = CodeCopy.of_this_code(records, tuple(sorted(plug_ins))) if cluster.freeze else None
    executor = Executor(records, cluster, code)
    name, runs = request.target.name, len(request.runs)
    after = _job_ids(request.after)
    executor.update_parameters(
        **sbatch_parameters(cluster, records, name, runs, after, request.at_once)
    )
    check_sbatch_variables(executor.script())
    return executor


def _job_ids(after: Sequence[Record]) -> str:
    return ":".join(record.job_id for record in after)


def _task(cluster: Cluster, run: RunSpec, frozen: FrozenRun, code: str | None) -> Task:
    return Task(
        arguments=frozen.arguments,
        run=str(run.run.absolute()),
        log=str(frozen.log),
        launcher=cluster.launcher,
        min_nodes=1 if cluster.spares else cluster.min_nodes,
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
