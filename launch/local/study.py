"""A study on this machine: each run is a process, side by side on free devices."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import IO

from harness.data.loaders.child_process import PR_SET_PDEATHSIG
from harness.errors import FAILED, FINISHED, STOPPED, UserError
from harness.outcome import Outcome, State
from harness.resilience.stopping import StopRequest
from launch.cluster_file import RANK_VARIABLES
from launch.records import (
    LOCAL,
    Record,
    is_finished,
    read_outcome,
    read_records,
    read_status,
    records_folder,
    write_records,
)
from launch.run_output import finished_error, tail
from launch.run_spec import RunSpec
from launch.slurm.log import BAD_LINE

POLL_S = 0.2
PROGRESS_S = 30.0
BEGUN = "--- "  # precedes the time of a start in the log of a run


@dataclass(frozen=True)
class Device:
    """A place for one run. `gpu` is its name in CUDA_VISIBLE_DEVICES, None for the CPU."""

    gpu: str | None
    threads: int


def devices_here(runs: Sequence[RunSpec], at_once: int | None) -> list[Device]:
    """Return a GPU for each run, or `at_once` places dealt out to the GPUs.

    Without GPUs there is one place, or `at_once`. All share the cores that this process may use.
    """
    gpus: list[str | None] = []
    if any(run.config.run.device != "cpu" for run in runs):
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(64)]
        gpus = [*names[: torch.cuda.device_count()]]
    count = at_once or len(gpus) or 1
    threads = max(len(os.sched_getaffinity(0)) // count, 1)
    return [Device(gpus[i % len(gpus)] if gpus else None, threads) for i in range(count)]


@dataclass
class Child:
    """A run under way."""

    spec: RunSpec
    device: Device
    process: subprocess.Popen[bytes]
    log: Path
    begun_s: float = field(default_factory=time.monotonic)
    stopping: bool = False  # it was asked to stop

    def stop(self) -> None:
        """Send TERM once, as a second one would end a run that has written its checkpoint."""
        if not self.stopping:
            self.process.terminate()
            self.stopping = True

    def outcome(self) -> Outcome:
        """Return how the run ended, with a reason for people."""
        code, recorded = self.process.returncode, read_outcome(self.spec.run)
        if code == FINISHED or (self.stopping and is_finished(self.spec.run)):
            took = timedelta(seconds=round(time.monotonic() - self.begun_s))
            error = finished_error(self.spec.run, read_status(self.spec.run))
            return Outcome(State.FINISHED, f"{error}, in {took}")
        if code == STOPPED:
            return recorded or Outcome(State.STOPPED)
        if code == -signal.SIGTERM and self.stopping:  # the harness had yet to install its handler
            return Outcome(State.STOPPED, "before its first step")
        how = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
        why = f"ended {how}: {self._complaint()}"
        with self.log.open("a", encoding="utf-8", errors="surrogateescape") as log:
            log.write(f"error: {why}\n")  # `status` shows the last line
        return Outcome(State.FAILED, why)

    def _complaint(self) -> str:
        """Return the last line since the start of the run that reports an error."""
        lines = [line.strip() for line in tail(self.log)]
        begun = max((i for i, line in enumerate(lines) if line.startswith(BEGUN)), default=-1)
        said = [line for line in lines[begun + 1 :] if line] or ["it wrote nothing"]
        bad = [line for line in said if BAD_LINE.match(line)]
        return (bad or said)[-1].removeprefix("error: ")


class LocalStudy:
    """The runs of the study in `folder`; those that have not finished are run."""

    def __init__(self, folder: Path, specs: Sequence[RunSpec], devices: Sequence[Device]) -> None:
        self.folder, self.specs, self.free = folder, specs, [*devices]
        self.waiting = [run for run in specs if not run.is_finished()]
        self.children: list[Child] = []
        self.ended = {State.FINISHED: len(specs) - len(self.waiting)}
        self.ended |= {State.STOPPED: 0, State.FAILED: 0}
        self._kill = False
        self._records: dict[str, Record] = {}
        self._begun_s = self._reported_s = time.monotonic()
        self._images_before = sum(map(_images_done, specs))

    def run(self) -> int:
        """Run to the end, or until a signal; return the exit code. Raises UserError."""
        with only_command(self.folder), StopRequest(self._kill_children).listen() as stop:
            self._record()
            while self.children or (stop.signal is None and self._next()):
                while self.free and stop.signal is None and (run := self._next()):
                    self.waiting.remove(run)
                    self._start(run, self.free.pop(0))
                time.sleep(POLL_S)
                self._collect()
                if stop.signal is not None:
                    self._stop()
                elif time.monotonic() - self._reported_s > PROGRESS_S:
                    self._progress()
        return self._end()

    def _record(self) -> None:
        """Record all runs from the start, so that `status` shows those that wait, too."""
        known, host = read_records(self.folder, LOCAL), socket.gethostname()
        folder = records_folder(self.folder, LOCAL).absolute()
        for run in self.specs:
            config, log = str(folder / f"{run.name}.yaml"), str(folder / f"{run.name}.log")
            new = Record(run.name, str(run.run), config, log, "", 0, host=host, backend=LOCAL)
            self._records[run.name] = known.get(run.name, new)
        write_records(self.folder, [*self._records.values()], LOCAL)

    def _start(self, spec: RunSpec, device: Device) -> None:
        run = spec.config.run
        if run.loader_threads == "auto":  # which would be all cores
            run = run.model_copy(update={"loader_threads": device.threads})
        resolved = spec.config.model_copy(update={"run": run})
        frozen = spec.freeze(self.folder, LOCAL, resolved)
        words = [sys.executable, "-m", "harness", "train", *frozen.arguments]
        with frozen.log.open("ab") as log:
            log.write(f"{BEGUN}{time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            log.flush()
            process = _start_process(words, device, log)
        self.children.append(Child(spec, device, process, frozen.log))
        record = replace(
            self._records[spec.name],
            config=str(frozen.config),
            log=str(frozen.log),
            job_id=str(process.pid),
            host=socket.gethostname(),
        )
        write_records(self.folder, [record], LOCAL)
        where = "" if device.gpu is None else f" on GPU {device.gpu}"
        print(f"{spec.name} started{where}", flush=True)

    def _next(self) -> RunSpec | None:
        """Return the first waiting run whose teacher, if any, has finished."""
        under_way = {child.spec.run for child in self.children}

        def ready(run: RunSpec) -> bool:
            teacher = run.teacher
            return teacher is None or (teacher.run not in under_way and is_finished(teacher.run))

        return next(filter(ready, self.waiting), None)

    def _give_up_students(self, teacher: RunSpec) -> None:
        """Give up the students of a teacher that has failed, and their students."""
        for run in [run for run in self.waiting if run.teacher and run.teacher.run == teacher.run]:
            self.waiting.remove(run)
            self.ended[State.FAILED] += 1
            print(f"{run.name} not started: its teacher, {teacher.run}, has failed", flush=True)
            self._give_up_students(run)

    def _collect(self) -> None:
        """Report the children that have ended, and free their devices."""
        for child in [child for child in self.children if child.process.poll() is not None]:
            self.children.remove(child)
            self.free.append(child.device)
            outcome = child.outcome()
            self.ended[outcome.state] += 1
            print(
                f"{child.spec.name} {outcome.state.value}: {outcome.reason}{self._count()}",
                flush=True,
            )
            if outcome.state is State.FAILED:
                self._give_up_students(child.spec)

    def _kill_children(self) -> None:
        """Have the runs killed, after a second Ctrl-C."""
        self._kill = True

    def _stop(self) -> None:
        for child in self.children:
            if self._kill:
                child.process.kill()
            else:
                child.stop()

    def _count(self) -> str:
        return f" ({self.ended[State.FINISHED]} of {len(self.specs)} finished)"

    def _progress(self) -> None:
        """Print each run's step, and the time left at the present rate of images."""
        self._reported_s = time.monotonic()
        total = sum(run.config.total_steps * run.config.recipe.minibatch for run in self.specs)
        done = sum(map(_images_done, self.specs))
        rate = (done - self._images_before) / (self._reported_s - self._begun_s)
        steps = [
            f"{child.spec.name} step {status.get('step', 0)}/{child.spec.config.total_steps}"
            for child in self.children
            for status in [read_status(child.spec.run)]
        ]
        left = f", left {timedelta(seconds=round((total - done) / rate))}" if rate > 0 else ""
        print(f"{', '.join(steps)}; {rate:.0f} images/s{left}{self._count()}", flush=True)

    def _end(self) -> int:
        left = len(self.waiting) + self.ended[State.STOPPED]
        counts = [f"{count} {state.value}" for state, count in self.ended.items() if count]
        counts += [f"{len(self.waiting)} not started"] if self.waiting else []
        print(f"{len(self.specs)} runs: {', '.join(counts)}", flush=True)
        if left:
            return STOPPED
        return FAILED if self.ended[State.FAILED] else FINISHED


def _images_done(spec: RunSpec) -> int:
    return read_status(spec.run).get("step", 0) * spec.config.recipe.minibatch


def _start_process(words: list[str], device: Device, log: IO[bytes]) -> subprocess.Popen[bytes]:
    # in a terminal of a SLURM job, too, each run is one rank by itself
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in RANK_VARIABLES and not name.startswith("SLURM_")
    }
    environment.setdefault("OMP_NUM_THREADS", str(device.threads))
    if device.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device.gpu
    parent = os.getpid()

    def in_child() -> None:  # no other thread runs in it
        for number in (signal.SIGINT, signal.SIGHUP):  # a terminal's; the parent decides
            signal.signal(number, signal.SIG_IGN)
        if sys.platform == "linux":  # if the parent is killed, its runs stop, too
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(FAILED)

    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        preexec_fn=in_child,
    )


@contextmanager
def only_command(folder: Path) -> Iterator[None]:
    """Make the records' folder; within, no other command runs this study. Raises UserError."""
    records = records_folder(folder, LOCAL)
    try:
        records.mkdir(parents=True, exist_ok=True)
        lock = (records / "lock").open("a")
    except OSError as error:
        raise UserError(
            f"{records}: cannot be written: {error.strerror}; take another --out"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another command runs this study; wait for it") from None
        yield
