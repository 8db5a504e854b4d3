"""What each task of a job runs: the harness as a child, its signals, its logs, its requeue."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from harness.errors import FAILED, FINISHED, STOPPED, USER_ERROR
from launch.records import read_status
from launch.slurm.log import SPARE_S, MergedLog, Pump
from launch.slurm.scontrol import Job, SlurmUnavailable, find_job, requeue
from launch.slurm.task_place import TaskPlace

USER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)  # the time limit, preemption, scancel --signal
STOP_SIGNALS = (signal.SIGTERM, *USER_SIGNALS)
REPEAT_S = 0.5  # a stop signal is repeated, as a rank that still imports does not hear it
MAX_RESTARTS = 3  # in place, by torchrun
AGREED = "stopped after step"  # begins the reason of a run whose ranks stopped together


@dataclass
class Task:
    """submitit's callable for one run; the same on every task of the job.

    `arguments` are those of `harness train`; `log` is the merged log; `code` is the folder of the
    copy of the code that the ranks run, None for the one that Python finds. Ends with 0 where the
    run has finished or the job was requeued, 75 where it stopped and no requeue is left, else with
    the code of the rank.
    """

    arguments: tuple[str, ...]
    run: str
    log: str
    launcher: str
    min_nodes: int
    gpus_per_node: int
    requeues: int
    environment: dict[str, str]
    code: str | None = None  # also of a task that was submitted before there were copies
    _signal: int | None = field(default=None, init=False)
    _signalled_at_s: float = field(default=0.0, init=False)

    def __call__(self) -> None:
        place = TaskPlace(self.launcher)
        log = MergedLog(self.log, place)
        if place.leader:
            log.line(place.describe(self.requeues))
        if place.restarts > self.requeues:
            if place.leader:
                log.error(f"requeued more often than requeues: {self.requeues}; submit it again")
            sys.exit(STOPPED)
        code = self._run_child(place, log)
        if code != FINISHED or (place.leader and self._stopped_under_torchrun()):
            sys.exit(self._end(code, place, log))

    def checkpoint(self) -> Any:
        """submitit asks for it where a signal comes before the child has been started."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _run_child(self, place: TaskPlace, log: MergedLog) -> int:
        """The exit code of the ranks' process; minus the signal that killed it."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        environment = self._environment(place, log)
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
                grace_s = float(environment.get("HARNESS_GRACE_S", "25")) + SPARE_S
                code = self._wait_for(child, place, log, grace_s)
            log.complaint = read_torchrun_error(error_file) or log.complaint
        return code

    def _wait_for(
        self, child: subprocess.Popen[bytes], place: TaskPlace, log: MergedLog, grace_s: float
    ) -> int:
        """The exit code of `child`, which a stop signal of this task reaches, too."""
        told = False
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(REPEAT_S)
            if self._signal is not None:
                if place.leader and not told:
                    log.line(f"{signal.Signals(self._signal).name}: stopping")
                told = True
                stop_ranks(child, self.launcher)
                if time.monotonic() - self._signalled_at_s > grace_s:
                    log.error(f"still running {grace_s:.0f} s after the signal: killed")
                    child.kill()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # a second one of another kind tells no more: the first is why we end
        if self._signal is None:
            self._signal, self._signalled_at_s = number, time.monotonic()

    def _command(self, place: TaskPlace) -> list[str]:
        train = [self.code or "-m", "harness", "train", *self.arguments]
        if self.launcher == "srun":
            return [sys.executable, *train]
        ranks = ["--nnodes", f"{min(self.min_nodes, place.nodes)}:{place.nodes}"]
        ranks += ["--nproc-per-node", str(self.gpus_per_node), "--max-restarts", str(MAX_RESTARTS)]
        ranks += ["--rdzv-backend", "c10d", "--rdzv-id", place.raw_job_id]
        ranks += ["--rdzv-endpoint", f"{place.first_host}:{place.port}"]
        ranks += ["--rdzv-conf", f"is_host={place.leader:d}", "--local-addr", place.host]
        # not the agent is told to stop, which would end as failed, but its ranks
        ranks += ["--signals-to-handle", "SIGHUP"]
        return [sys.executable, "-m", "torch.distributed.run", *ranks, *train]

    def _environment(self, place: TaskPlace, log: MergedLog) -> dict[str, str]:
        """This environment and what the cluster file adds; what was set stands, and is told."""
        environment = dict(os.environ)
        added = self.environment
        if self.launcher == "torchrun":
            # without it an agent that comes late waits for ever for the first round's store
            added = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} | added
        for name, value in added.items():
            here = environment.setdefault(name, value)
            if here != value and place.leader:
                log.line(f"environment: {name}={here} stands on {place.host}, not {value}")
        return environment

    def _end(self, code: int, place: TaskPlace, log: MergedLog) -> int:
        """Decides whether a run that has not finished goes back into the queue."""
        stopped = code in (STOPPED, FINISHED)
        if stopped and not place.leader:
            return FINISHED  # the leader decides; another code would have srun kill it meanwhile
        reason = read_status(Path(self.run)).get("reason", "")
        if self._signal == signal.SIGTERM and not reason.startswith(AGREED) and code != USER_ERROR:
            stopped = self._meant_for_the_job(place)
        elif self._signal in USER_SIGNALS and code != USER_ERROR:
            stopped = True  # also where no checkpoint came of it
        if stopped:
            return self._requeue(place, log) if place.leader else FINISHED
        if not self._signal:
            said = f": {log.complaint}" if log.complaint else ""
            log.error(f"ended {_cause(code)}{said}")
        elif place.leader:
            log.error(f"ended as another rank did: {reason or _cause(code)}")
        return FAILED if code in (STOPPED, FINISHED) else code if code > 0 else 128 - code

    def _meant_for_the_job(self, place: TaskPlace) -> bool:
        """Whether a TERM was SLURM's; else it was srun's, to all ranks when one has failed."""
        job = _find_job(place.job_id)
        return job is not None and (job.preempted or job.state != "RUNNING")

    def _requeue(self, place: TaskPlace, log: MergedLog) -> int:
        """Only a running job: one that SLURM requeues or that a user cancelled is not ours."""
        job = _find_job(place.job_id)
        if job is None or job.state != "RUNNING":
            log.line(f"stopped; SLURM has the job as {job.state if job else 'unknown'}")
            return STOPPED if job is None else FINISHED
        if place.restarts >= self.requeues:
            log.error(f"stopped, and requeues: {self.requeues} are used up; submit it again")
            return STOPPED
        if failure := requeue(place.job_id):
            log.error(f"stopped, not requeued: {failure}; submit it again")
            return STOPPED
        log.line(f"requeued, {place.restarts + 1} of at most {self.requeues} times")
        return FINISHED

    def _stopped_under_torchrun(self) -> bool:
        """Its ranks end with 0 then too, as torchrun would start them again."""
        return self.launcher == "torchrun" and read_status(Path(self.run)).get("state") == "stopped"


def _ignore_stop_signals() -> None:
    """In the child: no signal is deadly while it imports; the harness then handles them."""
    for number in STOP_SIGNALS:
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
    """The message of torchrun's error file; "" where there is none."""
    try:
        return str(json.loads(path.read_text())["message"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def stop_ranks(child: subprocess.Popen[bytes], launcher: str) -> None:
    """TERM to the rank, or to each rank of torchrun's agent."""
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
