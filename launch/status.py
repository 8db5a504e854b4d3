"""The state of what was started, in one table, and the log of a job as it grows."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from harness.config.schema import NO_EXPECTATION
from harness.errors import FAILED, FINISHED, STOPPED, UserError
from harness.outcome import Outcome, State
from harness.runs.environment import recorded_code_changes
from harness.runs.headline import read_headline
from launch.records import Record, read_records, read_status, records_folder
from launch.slurm.scontrol import CANNOT_WRITE, WAITING, Job, SlurmUnavailable, find_job

POLL_S = 1.0
TAIL_BYTES = 1 << 16
CODE_EVENTS = re.compile(rb'"event": "(code_changed|resume)"')
HEAD = ("run", "job", "state", "step", "images/s", "requeued", "")


class Stage(Enum):
    """How far a run has come, as SLURM and its status tell."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    ENDING = "ending"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class RunState:
    """The stage of a run, with a reason for people."""

    stage: Stage
    reason: str = ""


def state_of(record: Record) -> tuple[RunState, Job | None, dict[str, Any]]:
    """Return the state of a run: SLURM knows its job, and status.json how far it has come."""
    status = read_status(Path(record.run))
    outcome = Outcome.from_status(status)
    job = find_job(record.job_id) if record.host is None else None
    if outcome is not None and outcome.state is State.FINISHED:
        error = finished_error(Path(record.run), status)
        return RunState(Stage.FINISHED, error), job, status
    if job is not None and job.active:
        return _under_way(record, job, status), job, status
    if record.host is not None and (here := _state_here(record, status)):
        return here, None, status
    if job is not None and job.state == "CANCELLED":
        return RunState(Stage.CANCELLED, _why_cancelled(record, job)), job, status
    stopped = outcome is not None and outcome.state is State.STOPPED
    if outcome and stopped and (job is None or job.exit_code in (FINISHED, STOPPED)):
        reason = f"{outcome.reason}; submit it again to resume"
        return RunState(Stage.STOPPED, reason), job, status
    return RunState(Stage.FAILED, _why_failed(record, job, status)), job, status


def finished_error(run: Path, status: dict[str, Any]) -> str:
    """A finished run's error, the epochs it is of, and what is expected."""
    expected = status.get("expected")
    beside = NO_EXPECTATION if expected is None else f"expected {expected:.2f} %"
    return f"error {read_headline(run, status)}, {beside}"


def _under_way(record: Record, job: Job, status: dict[str, Any]) -> RunState:
    if job.state in WAITING:
        return RunState(Stage.QUEUED, job.reason if job.reason != "None" else "")
    if status.get("state") == "running" and status["heartbeat"] > job.started_s:
        return RunState(Stage.RUNNING, f"on {job.nodes}")
    stage = Stage.ENDING if job.state == "COMPLETING" else Stage.STARTING
    return RunState(stage, f"on {job.nodes}")


def _state_here(record: Record, status: dict[str, Any]) -> RunState | None:
    """Of a run without SLURM: whether it is yet to come, or its process lives."""
    if not record.job_id:
        return RunState(Stage.QUEUED)
    if record.host != socket.gethostname() or not os.path.exists(f"/proc/{record.job_id}"):
        return None
    began = status.get("state") == "running" and status["pid"] == int(record.job_id)
    return RunState(Stage.RUNNING if began else Stage.STARTING, f"on {record.host}")


def _why_cancelled(record: Record, job: Job) -> str:
    if record.after is not None and job.nodes in ("", "(null)"):
        return f"job {record.after}, which it waited for, did not succeed"
    return "by scancel; submit it again to resume"


def _why_failed(record: Record, job: Job | None, status: dict[str, Any]) -> str:
    """The last line of its log, or why there is none."""
    lines = [line for line in tail(Path(record.log)) if line.strip()]
    if lines:
        return lines[-1]
    if job is not None and job.exit_signal == CANNOT_WRITE:
        return f"{job.nodes} cannot write {Path(record.log).parent}: set folder in the cluster file"
    return f"{job.state if job else 'unknown to SLURM'}, and it wrote no log"


def tail(path: Path) -> list[str]:
    """The last lines of a file, whole ones; [] where there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return lines[1:] if size > TAIL_BYTES else lines


def images_per_s(run: Path) -> float | None:
    """Of the last line that was logged."""
    for text in reversed(tail(run / "log.jsonl")):
        with contextlib.suppress(ValueError):  # cut off by a crash
            line = json.loads(text)
            if line["event"] == "train":
                return line["images_per_s"]
    return None


def code_warnings(record: Record) -> list[str]:
    """A line for each step from which the run's code is another one."""
    try:
        with (Path(record.run) / "log.jsonl").open("rb") as file:
            found = [line for line in file if CODE_EVENTS.search(line)]  # few of many
    except OSError:
        return []
    events = []
    for line in found:
        with contextlib.suppress(ValueError):  # cut off by a crash
            events.append(json.loads(line))
    return [
        f"warning: {record.name}: other code from step {step} on: {changes}"
        for step, changes in recorded_code_changes(events).items()
    ]


def table(target: Path) -> str:
    """One line a run of RUN or STUDY, and below them its changes of code.

    Raises UserError where nothing was submitted.
    """
    records = read_records(target) | read_records(target, "local")
    if not records:
        raise UserError(f"{target}: nothing was submitted for it ({records_folder(target)})")
    rows = [HEAD, *(_row(record) for record in records.values())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    warnings = [line for record in records.values() for line in code_warnings(record)]
    return "\n".join([*(line.rstrip() for line in aligned), *warnings])


def _row(record: Record) -> tuple[str, ...]:
    state, job, status = state_of(record)
    step = f"{status['step']}/{status['total_steps']}" if "total_steps" in status else ""
    rate = images_per_s(Path(record.run)) if state.stage is Stage.RUNNING else None
    restarts = job.restarts if job is not None else status.get("restarts", 0)
    cells = (record.name, record.job_id, state.stage.value, step, f"{rate:.0f}" if rate else "")
    return (*cells, str(restarts), state.reason)


def follow(records: list[Record]) -> int:
    """Prints the merged logs as they grow until the jobs have ended; returns the exit code."""
    read = dict.fromkeys(records, 0)
    while True:
        active = any(map(_is_active, records))
        for record in records:
            read[record] = _print_from(Path(record.log), read[record], len(records) > 1)
        if not active:
            return _report_end(records)
        time.sleep(POLL_S)


def _is_active(record: Record) -> bool:
    try:
        job = find_job(record.job_id)
    except SlurmUnavailable:  # slurmctld is busy, or being restarted
        return True
    return job is not None and job.active


def _print_from(log: Path, position: int, several: bool) -> int:
    try:
        with log.open("rb") as file:
            file.seek(position)
            for line in file:
                if line.endswith(b"\n"):
                    text = line.decode(errors="replace").rstrip()
                    print(f"{log.stem}: {text}" if several else text, flush=True)
                    position += len(line)
    except FileNotFoundError:
        pass  # it waits in the queue
    return position


def _report_end(records: list[Record]) -> int:
    states = [state_of(record)[0] for record in records]
    for record, state in zip(records, states, strict=True):
        print(f"job {record.job_id} {state.stage.value}: {state.reason}", flush=True)
    stages = {state.stage for state in states}
    if stages == {Stage.FINISHED}:
        return FINISHED
    return STOPPED if stages <= {Stage.FINISHED, Stage.STOPPED} else FAILED
