"""The task of a job: the harness as a child, its signals, its logs, its requeue."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from submitit.helpers import DelayedSubmission

from harness.errors import FAILED, FINISHED, STOPPED, USER_ERROR, UserError
from harness.outcome import Outcome
from harness.resilience.grace import kill_after_s
from harness.resilience.stopping import StopRequest
from launch.records import read_status
from launch.slurm.log import Pump, TaskLog, open_log
from launch.slurm.raw_logs import killed_task
from launch.slurm.requeue import USER_SIGNALS, Decision, Requeuer, TaskEnd, decide
from launch.slurm.scontrol import Job, SlurmUnavailable, find_job, requeue
from launch.slurm.task_place import TaskPlace

REPEAT_S = 0.5  # stop signals are repeated, as a rank that still imports does not hear them
MAX_RESTARTS = 3  # in place, by torchrun
WHO_REQUEUES = {
    Requeuer.TASK: "",
    Requeuer.BATCH_SCRIPT: "no scontrol here: the batch script requeues the job",
    Requeuer.NOBODY: (
        "no scontrol here and in the batch script: the job cannot be requeued; after a time limit "
        "or a preemption submit it again, or add SLURM's commands to PATH"
    ),
}


@dataclass
class Task:
    """submitit's callable for one run; the same on every task of the job.

    `arguments` are those of `harness train`; `log` is the merged log; `code` is the folder of the
    copy of the code that the ranks run, None for the code that Python finds. The task exits with 0
    where the run has finished or the job was requeued, 75 where it stopped and no requeue is left,
    else with the rank's code.
    """

    arguments: tuple[str, ...]
    run: str
    log: str
    launcher: str
    min_nodes: int
    gpus_per_node: int
    requeues: int
    environment: dict[str, str]
    code: str | None = None  # as in tasks submitted before there were copies

    def __call__(self) -> None:
        """Run the child to its end and exit with the task's code."""
        place = TaskPlace(self.launcher)
        log = open_log(self.log, place)
        code = self._run(place, log)
        log.close(failed=code not in (FINISHED, STOPPED))
        sys.exit(code)

    def _run(self, place: TaskPlace, log: TaskLog) -> int:
        if place.leader:
            log.line(place.describe(self.requeues))
        if why := self._check_start(place):
            if place.leader:
                log.error(why)
            return USER_ERROR
        if place.restarts > self.requeues:
            if place.leader:
                log.error(f"requeued more often than requeues: {self.requeues}; submit it again")
            return STOPPED
        if place.leader and place.left_out:
            log.line(f"without {place.left_out}: see {place.job_id}_batch.log for what is wrong")
        if place.leader and (who := WHO_REQUEUES[place.requeuer]):
            log.line(who)
        before, stop = self._incarnation(), StopRequest()
        with stop.listen():
            code = self._run_child(place, log, stop)
        outcome, counts = self._outcome_since(before), (place.restarts, self.requeues)
        end = TaskEnd(code, stop.signal, outcome, place.leader, *counts, place.requeuer)
        decision = decide(end, lambda: _find_job(place.job_id))
        by_srun = stop.signal is signal.SIGTERM and decision is not Decision.LEAVE_TO_SLURM
        # srun ends all tasks when it loses one, and only its own log says which
        if place.leader and by_srun and (lost := killed_task(Path(self.log).parent, place.job_id)):
            log.error(f"ended with another task, {lost}")
        return _carry_out(decision, end, place, log)

    def _check_start(self, place: TaskPlace) -> str:
        """Compare the tasks that srun has started with the plan; return the difference or ""."""
        a_node = 1 if self.launcher == "torchrun" else self.gpus_per_node
        if place.nodes >= self.min_nodes and place.tasks == place.nodes * a_node:
            return ""
        return (
            f"srun started {place.tasks} tasks on {place.nodes} nodes, not {a_node} on each of "
            f"{self.min_nodes} or more; see sbatch: and setup: of the cluster file"
        )

    def checkpoint(self) -> DelayedSubmission:
        """Tell submitit what to submit again where a signal precedes the child's start."""
        return DelayedSubmission(self)

    def _incarnation(self) -> object:
        return read_status(Path(self.run)).get("incarnation")

    def _outcome_since(self, incarnation: object) -> Outcome | None:
        """Return how this start ended; None if status.json is still that of an earlier one."""
        status = read_status(Path(self.run))
        return None if status.get("incarnation") == incarnation else Outcome.from_status(status)

    def _run_child(self, place: TaskPlace, log: TaskLog, stop: StopRequest) -> int:
        """Return the exit code of the ranks' process; minus the signal that killed it."""
        environment = self._environment(place, log)
        try:
            killed_after_s = kill_after_s(environment)
        except UserError as error:
            log.error(str(error))
            return USER_ERROR
        with tempfile.TemporaryDirectory() as folder:
            error_file = Path(folder) / "error.json"
            if self.launcher == "torchrun":  # its agent copies the first error of its ranks there
                environment["TORCHELASTIC_ERROR_FILE"] = str(error_file)
            child = subprocess.Popen(
                self._command(place),
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                preexec_fn=_ignore_stop_signals,  # no thread runs yet
            )
            assert child.stdout and child.stderr
            out = Pump(child.stdout, sys.stdout, log.output)
            with out, Pump(child.stderr, sys.stderr, log.errors):
                code = self._wait_for(child, place, log, stop, killed_after_s)
            if cause := read_torchrun_error(error_file):
                log.note_cause(cause)
        return code

    def _wait_for(
        self,
        child: subprocess.Popen[bytes],
        place: TaskPlace,
        log: TaskLog,
        stop: StopRequest,
        killed_after_s: float,
    ) -> int:
        """Return the exit code of `child`, passing a stop signal of this task on to it."""
        announced = False
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(REPEAT_S)
            log.collect()
            if stop.signal is None or stop.asked_at_s is None:
                continue
            if place.leader and not announced:
                log.line(f"{stop.signal.name}: stopping")
            announced = True
            stop_ranks(child, self.launcher)
            if time.monotonic() - stop.asked_at_s > killed_after_s:
                log.error(f"still running {killed_after_s:.0f} s after the signal: killed")
                child.kill()

    def _command(self, place: TaskPlace) -> list[str]:
        train = [self.code or "-m", "harness", "train", *self.arguments]
        if self.launcher == "srun":
            return [sys.executable, *train]
        ranks = ["--nnodes", f"{min(self.min_nodes, place.nodes)}:{place.nodes}"]
        ranks += ["--nproc-per-node", str(self.gpus_per_node), "--max-restarts", str(MAX_RESTARTS)]
        ranks += ["--rdzv-backend", "c10d", "--rdzv-id", place.raw_job_id]
        ranks += ["--rdzv-endpoint", f"{place.first_host}:{place.port}"]
        ranks += ["--rdzv-conf", f"is_host={place.leader:d}", "--local-addr", place.host]
        # the ranks are signalled, not the agent, which would end as failed
        ranks += ["--signals-to-handle", "SIGHUP"]
        return [sys.executable, "-m", "torch.distributed.run", *ranks, *train]

    def _environment(self, place: TaskPlace, log: TaskLog) -> dict[str, str]:
        """Return this environment with the cluster file's; variables that are set prevail."""
        environment = dict(os.environ)
        added = self.environment
        if self.launcher == "torchrun":
            # without it an agent that joins late waits forever for the first round's store
            added = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} | added
        for name, value in added.items():
            here = environment.setdefault(name, value)
            if here != value and place.leader:
                log.line(f"environment: {place.host} keeps its {name}={here}, not {value}")
        return environment


def _carry_out(decision: Decision, end: TaskEnd, place: TaskPlace, log: TaskLog) -> int:
    """Requeue the job if that is the decision, log it, and return the task's exit code."""
    match decision:
        case Decision.FINISH | Decision.LEAVE_TO_LEADER:
            return FINISHED
        case Decision.REQUEUE:
            if failure := requeue(place.job_id):
                log.error(f"stopped, not requeued: {failure}; submit it again")
                return STOPPED
            log.line(f"requeued, {place.restarts + 1} of at most {end.requeues} times")
            return FINISHED
        case Decision.LEAVE_TO_BATCH_SCRIPT:
            assert place.requeue_file is not None  # else it would not be left to the script
            Path(place.requeue_file).touch()
            log.line(f"the batch script requeues, {place.restarts + 1} of {end.requeues} times")
            return FINISHED
        case Decision.LEAVE_TO_SLURM:
            log.line("stopped; SLURM requeues or cancels the job")
            return FINISHED
        case Decision.UNKNOWN_JOB:
            log.line("stopped; SLURM does not know the job; submit it again")
            return STOPPED
        case Decision.NO_CLIENTS:
            log.error("stopped, and no scontrol is there to requeue the job; submit it again")
            return STOPPED
        case Decision.NO_REQUEUE_LEFT:
            log.error(f"stopped, and requeues: {end.requeues} are used up; submit it again")
            return STOPPED
        case Decision.FAIL:
            _log_failure(end, place, log)
            code = end.exit_code
            return FAILED if code in (STOPPED, FINISHED) else code if code > 0 else 128 - code


def _log_failure(end: TaskEnd, place: TaskPlace, log: TaskLog) -> None:
    if end.signal is None:
        said = f": {log.complaint}" if log.complaint else ""
        log.error(f"ended {_cause(end.exit_code)}{said}")
    elif place.leader:
        reason = end.outcome.reason if end.outcome else ""
        log.error(f"ended as another rank did: {reason or _cause(end.exit_code)}")


def _ignore_stop_signals() -> None:
    """In the child: let no signal end it while it imports; the harness then handles them."""
    for number in (signal.SIGTERM, *USER_SIGNALS):
        signal.signal(number, signal.SIG_IGN)


def _find_job(job_id: str) -> Job | None:
    with contextlib.suppress(SlurmUnavailable):
        return find_job(job_id)
    return None


def _cause(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    return f"by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -9 else "")


def read_torchrun_error(path: Path) -> str:
    """Return the message of torchrun's error file; "" where there is none."""
    try:
        return str(json.loads(path.read_text())["message"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def stop_ranks(child: subprocess.Popen[bytes], launcher: str) -> None:
    """Send TERM to the rank, or to each rank of torchrun's agent."""
    ranks = _children(child.pid) if launcher == "torchrun" else [child.pid]
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGTERM)


def _children(pid: int) -> list[int]:
    try:
        threads = Path(f"/proc/{pid}/task").glob("*/children")
        return [int(child) for thread in threads for child in thread.read_text().split()]
    except OSError:
        return []  # it has just ended
