"""Runs a study on this machine: each run a process, side by side on free devices."""

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

from harness.atomic_file import write_atomically
from harness.config.loading import dump_config
from harness.data.loaders.child_process import PR_SET_PDEATHSIG
from harness.errors import FAILED, FINISHED, STOPPED, UserError
from harness.outcome import Outcome, State
from harness.resilience.stopping import StopRequest
from launch.records import (
    Record,
    is_finished,
    read_outcome,
    read_records,
    read_status,
    records_folder,
    write_records,
)
from launch.run_spec import RunSpec
from launch.slurm.cluster_file import RANK_VARIABLES
from launch.slurm.log import BAD_LINE
from launch.status import finished_error, tail

POLL_S = 0.2
PROGRESS_S = 30.0
BEGUN = "--- "  # before the time at which a run was started, in its log


@dataclass(frozen=True)
class Device:
    """What one run at a time gets. `gpu`: as CUDA_VISIBLE_DEVICES names it; None: the CPU."""

    gpu: str | None
    threads: int


def devices_here(runs: Sequence[RunSpec], at_once: int | None) -> list[Device]:
    """A GPU a run, or `at_once` runs dealt out to the GPUs; without GPUs one run, or `at_once`.

    They share the cores that this process may use.
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

    wanted: RunSpec
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
        code, recorded = self.process.returncode, read_outcome(self.wanted.run)
        if code == FINISHED or (self.stopping and is_finished(self.wanted.run)):
            took = timedelta(seconds=round(time.monotonic() - self.begun_s))
            error = finished_error(self.wanted.run, read_status(self.wanted.run))
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
        """What it said last of what is wrong, since it was started."""
        lines = [line.strip() for line in tail(self.log)]
        begun = max((i for i, line in enumerate(lines) if line.startswith(BEGUN)), default=-1)
        said = [line for line in lines[begun + 1 :] if line] or ["it said nothing"]
        bad = [line for line in said if BAD_LINE.match(line)]
        return (bad or said)[-1].removeprefix("error: ")


class LocalStudy:
    """The runs of the study in `folder`, of which those that have not finished are run."""

    def __init__(self, folder: Path, wanted: Sequence[RunSpec], devices: Sequence[Device]) -> None:
        self.folder, self.wanted, self.free = folder, wanted, [*devices]
        self.waiting = [run for run in wanted if not run.is_finished()]
        self.children: list[Child] = []
        self.ended = {State.FINISHED: len(wanted) - len(self.waiting)}
        self.ended |= {State.STOPPED: 0, State.FAILED: 0}
        self._kill = False
        self._begun_s = self._told_s = time.monotonic()
        self._images_before = sum(map(_images_done, wanted))

    def run(self) -> int:
        """To the end, or until a signal; returns the exit code. Raises UserError."""
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
                elif time.monotonic() - self._told_s > PROGRESS_S:
                    self._progress()
        return self._end()

    def _record(self) -> None:
        """All runs are told of from the start."""
        known, host = read_records(self.folder, "local"), socket.gethostname()
        self._records = {
            run.name: known.get(run.name)
            or Record(run.name, str(run.run), str(config), str(log), "", 0, host=host)
            for run in self.wanted
            for config, log in [_files(self.folder, run)]
        }
        write_records(self.folder, [*self._records.values()], "local")

    def _start(self, wanted: RunSpec, device: Device) -> None:
        config, log_path = _files(self.folder, wanted)
        run = wanted.config.run
        if run.loader_threads == "auto":  # which would be all cores
            run = run.model_copy(update={"loader_threads": device.threads})
        resolved = wanted.config.model_copy(update={"run": run})
        write_atomically(config, dump_config(resolved).encode())
        words = [sys.executable, "-m", "harness", "train", str(config), *wanted.typed]
        with log_path.open("ab") as log:
            log.write(f"{BEGUN}{time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            log.flush()
            process = _start_process([*words, "--out", str(wanted.run), "--resume"], device, log)
        self.children.append(Child(wanted, device, process, log_path))
        record = replace(self._records[wanted.name], job_id=str(process.pid))
        write_records(self.folder, [record], "local")
        where = "" if device.gpu is None else f" on GPU {device.gpu}"
        print(f"{wanted.name} started{where}", flush=True)

    def _next(self) -> RunSpec | None:
        """The first that waits, and not for its teacher."""
        under_way = {child.wanted.run for child in self.children}

        def ready(run: RunSpec) -> bool:
            teacher = run.teacher
            return teacher is None or (teacher.run not in under_way and is_finished(teacher.run))

        return next(filter(ready, self.waiting), None)

    def _give_up_students(self, teacher: RunSpec) -> None:
        """Of a teacher that has failed, and theirs."""
        for run in [run for run in self.waiting if run.teacher and run.teacher.run == teacher.run]:
            self.waiting.remove(run)
            self.ended[State.FAILED] += 1
            print(f"{run.name} not started: its teacher, {teacher.run}, has failed", flush=True)
            self._give_up_students(run)

    def _collect(self) -> None:
        """Takes in the children that have ended, and tells of them."""
        for child in [child for child in self.children if child.process.poll() is not None]:
            self.children.remove(child)
            self.free.append(child.device)
            outcome = child.outcome()
            self.ended[outcome.state] += 1
            print(
                f"{child.wanted.name} {outcome.state.value}: {outcome.reason}{self._count()}",
                flush=True,
            )
            if outcome.state is State.FAILED:
                self._give_up_students(child.wanted)

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
        return f" ({self.ended[State.FINISHED]} of {len(self.wanted)} finished)"

    def _progress(self) -> None:
        """A line: each run's step, and the time left as the images go that were trained on."""
        self._told_s = time.monotonic()
        total = sum(run.config.total_steps * run.config.recipe.minibatch for run in self.wanted)
        done = sum(map(_images_done, self.wanted))
        rate = (done - self._images_before) / (self._told_s - self._begun_s)
        steps = [
            f"{child.wanted.name} step {status.get('step', 0)}/{child.wanted.config.total_steps}"
            for child in self.children
            for status in [read_status(child.wanted.run)]
        ]
        left = f", left {timedelta(seconds=round((total - done) / rate))}" if rate > 0 else ""
        print(f"{', '.join(steps)}; {rate:.0f} images/s{left}{self._count()}", flush=True)

    def _end(self) -> int:
        left = len(self.waiting) + self.ended[State.STOPPED]
        counts = [f"{count} {state.value}" for state, count in self.ended.items() if count]
        counts += [f"{len(self.waiting)} not started"] if self.waiting else []
        print(f"{len(self.wanted)} runs: {', '.join(counts)}", flush=True)
        if left:
            return STOPPED
        return FAILED if self.ended[State.FAILED] else FINISHED


def _files(folder: Path, wanted: RunSpec) -> tuple[Path, Path]:
    """A run's config, as it was started, and its log."""
    records = records_folder(folder, "local")
    return records / f"{wanted.name}.yaml", records / f"{wanted.name}.log"


def _images_done(wanted: RunSpec) -> int:
    return read_status(wanted.run).get("step", 0) * wanted.config.recipe.minibatch


def _start_process(words: list[str], device: Device, log: IO[bytes]) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    environment.setdefault("OMP_NUM_THREADS", str(device.threads))
    if device.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device.gpu
    parent = os.getpid()

    def settle() -> None:  # no thread of ours runs
        for number in (signal.SIGINT, signal.SIGHUP):  # a terminal's; this process decides
            signal.signal(number, signal.SIG_IGN)
        if sys.platform == "linux":  # should this process be killed, its runs stop too
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(FAILED)

    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        preexec_fn=settle,
    )


@contextmanager
def only_command(folder: Path) -> Iterator[None]:
    """Makes the records' folder; within, no other command runs this study. Raises UserError."""
    records = records_folder(folder, "local")
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
