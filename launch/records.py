"""What was started for a run or a study: a folder beside it, NAME.slurm or NAME.local.

job.json · for each run its config, frozen, and its log · code-…, the code that its jobs run ·
submitit's scripts and raw logs
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.atomic_file import write_atomically
from harness.errors import UserError
from harness.outcome import Outcome, State


@dataclass(frozen=True)
class Record:
    """One run. `after`: the job that it waits for; `code`: the copy of the code that it runs.

    `host`: the machine that it was started on without SLURM; its job is then a process of that
    machine, or "" before it is started.
    """

    name: str
    run: str
    config: str
    log: str
    job_id: str
    requeues: int
    after: str | None = None
    host: str | None = None
    code: str | None = None


def records_folder(target: Path, kind: str = "slurm") -> Path:
    """That of a run folder or a study's folder; `kind`: slurm or local."""
    return target.with_name(f"{target.name}.{kind}")


def read_records(target: Path, kind: str = "slurm") -> dict[str, Record]:
    """By the runs' names; {} where nothing was started. Raises UserError where it is damaged."""
    path = records_folder(target, kind) / "job.json"
    try:
        return {name: Record(**values) for name, values in json.loads(path.read_text()).items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it to submit anew") from None


def write_records(target: Path, records: list[Record], kind: str = "slurm") -> None:
    """Adds to what was started before; a run's newest record stands."""
    every = read_records(target, kind) | {record.name: record for record in records}
    text = json.dumps({name: asdict(record) for name, record in every.items()}, indent=2)
    write_atomically(records_folder(target, kind) / "job.json", (text + "\n").encode())


def read_outcome(run: Path) -> Outcome | None:
    """Return how the run in a folder ended; None where it has not."""
    return Outcome.from_status(read_status(run))


def is_finished(run: Path) -> bool:
    """Return True if the run in a folder has finished."""
    outcome = read_outcome(run)
    return outcome is not None and outcome.state is State.FINISHED


def read_status(run: Path) -> dict[str, Any]:
    """Return status.json of a run folder; {} where there is none (yet)."""
    try:
        return json.loads((run / "status.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}
