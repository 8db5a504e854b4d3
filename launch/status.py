"""The state of what was started, in one table, and the logs of jobs as they grow."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from harness.errors import FAILED, FINISHED, STOPPED, UserError
from harness.outcome import State
from harness.runs.environment import recorded_code_changes
from launch.backend import RunState, Stage
from launch.records import (
    Record,
    is_finished,
    read_all_records,
    read_outcome,
    read_records,
    read_status,
    records_folder,
)
from launch.registry import find_backend
from launch.run_output import finished_error, tail
from launch.slurm.scontrol import SlurmUnavailable

POLL_S = 1.0
CODE_EVENTS = re.compile(rb'"event": "(code_changed|resume)"')
HEAD = ("run", "job", "state", "step", "images/s", "requeued", "")


def state_of(record: Record) -> RunState:
    """Return the state of a run: its launcher knows its job, its folder how it ended."""
    run = Path(record.run)
    if is_finished(run):
        return RunState(Stage.FINISHED, finished_error(run, read_status(run)))
    state = find_backend(record.backend).state(record)
    if state is not None:
        if state.stage is Stage.FAILED and not state.reason:
            return replace(state, reason=_last_line(record))
        return state
    outcome = read_outcome(run)
    if outcome is not None and outcome.state is State.STOPPED:
        return RunState(Stage.STOPPED, f"{outcome.reason}; submit it again to resume")
    return RunState(Stage.FAILED, _last_line(record) or "no job is known, and it wrote no log")


def _last_line(record: Record) -> str:
    lines = [line for line in tail(Path(record.log)) if line.strip()]
    return lines[-1] if lines else ""


def images_per_s(run: Path) -> float | None:
    """Return the rate that was logged last."""
    for text in reversed(tail(run / "log.jsonl")):
        with contextlib.suppress(ValueError):  # cut off by a crash
            line = json.loads(text)
            if line["event"] == "train":
                return line["images_per_s"]
    return None


def code_warnings(record: Record) -> list[str]:
    """Return a line for each step from which the run's code is different."""
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
    """Return one line per run of RUN or STUDY, and below them the changes of code.

    Raises UserError where nothing was submitted.
    """
    records = all_records(target)
    warnings = [line for record in records for line in code_warnings(record)]
    return "\n".join([*_aligned([_row(record) for record in records]), *warnings])


def table_below(folder: Path) -> str:
    """Return one line per run that was started below `folder`. Raises UserError without any."""
    targets = dict.fromkeys(_targets(folder))  # several launchers may have one
    records = [record for target in targets for record in all_records(target)]
    if not records:
        raise UserError(f"{folder}: nothing was submitted below it; give a cluster file's folder")
    # the run folders tell runs of one name apart
    rows = [(os.path.relpath(record.run, folder), *_row(record)[1:]) for record in records]
    return "\n".join(_aligned(rows))


def _targets(folder: Path) -> Iterator[Path]:
    """Yield the runs and studies below `folder` that were started, without reading run folders."""
    for place, folders, files in os.walk(folder):
        if "job.json" in files:
            yield Path(place).with_suffix("")
        is_run = "job.json" in files or "config.yaml" in files
        folders[:] = [] if is_run else sorted(folders)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (HEAD, *rows)]


def all_records(target: Path) -> list[Record]:
    """Return the records of RUN or STUDY. Raises UserError where there are none."""
    if records := read_all_records(target):
        return [*records.values()]
    raise UserError(f"{target}: nothing was submitted for it ({records_folder(target)})")


def _row(record: Record) -> tuple[str, ...]:
    state, status = state_of(record), read_status(Path(record.run))
    step = f"{status['step']}/{status['total_steps']}" if "total_steps" in status else ""
    rate = images_per_s(Path(record.run)) if state.stage is Stage.RUNNING else None
    requeues = status.get("requeues", 0) if state.requeues is None else state.requeues
    cells = (record.name, record.job_id, state.stage.value, step, f"{rate:.0f}" if rate else "")
    return (*cells, str(requeues), state.reason)


def active_records(target: Path) -> list[Record]:
    """Return the records of the runs that wait or run. Raises UserError where there are none."""
    return [record for record in all_records(target) if _is_active(record)]


def active_record(target: Path, name: str, backend: str) -> Record | None:
    """Return the record of a run that the launcher still has, waiting or running, else None."""
    record = read_records(target, backend).get(name)
    state = find_backend(backend).state(record) if record else None
    return record if state is not None and state.active else None


def follow(records: Sequence[Record]) -> int:
    """Print the merged logs as they grow until the runs have ended; return the exit code."""
    read = dict.fromkeys(records, 0)
    while True:
        active = any(map(_is_active, records))
        for record in records:
            read[record] = _print_from(Path(record.log), read[record], len(records) > 1)
        if not active:
            return _report_end(records)
        time.sleep(POLL_S)


def print_logs(target: Path) -> None:
    """Print the merged logs of RUN or STUDY as they are now."""
    records = all_records(target)
    for record in records:
        if not _print_from(Path(record.log), 0, len(records) > 1):
            print(f"{record.name}: {state_of(record).stage.value}, and there is no log yet")


def _is_active(record: Record) -> bool:
    try:
        state = find_backend(record.backend).state(record)
    except SlurmUnavailable:  # slurmctld is busy, or being restarted
        return True
    return state is not None and state.active


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


def _report_end(records: Sequence[Record]) -> int:
    states = [state_of(record) for record in records]
    for record, state in zip(records, states, strict=True):
        print(f"job {record.job_id} {state.stage.value}: {state.reason}", flush=True)
    stages = {state.stage for state in states}
    if stages == {Stage.FINISHED}:
        return FINISHED
    return STOPPED if stages <= {Stage.FINISHED, Stage.STOPPED} else FAILED
