"""The records of what was started for a run or a study, in NAME.slurm or NAME.local beside it.

job.json · for each run its frozen config and its log · code-…, the code that its jobs run ·
submitit's scripts and raw logs
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from glob import escape as glob_escape
from pathlib import Path
from typing import Any

from harness.atomic_file import write_atomically
from harness.errors import UserError
from harness.outcome import Outcome, State, recorded_state

LOCAL = "local"  # the launcher of this machine


@dataclass(frozen=True)
class Record:
    """One run that was started, or is to be.

    `backend`: the launcher's name. `job_id`: its job, or a process of `host`; "" before the start.
    `after`: the job that it waits for. `code`: the copy of the code that it runs.
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
    backend: str = "slurm"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Record:
        """Read a record; older ones name no launcher, and have a host only on this machine."""
        backend = LOCAL if values.get("host") is not None else "slurm"
        return cls(**{"backend": backend, **values})


def records_folder(target: Path, backend: str = "slurm") -> Path:
    """Return the folder of a launcher's records for a run folder or a study's folder."""
    return target.with_name(f"{target.name}.{backend}")


def read_all_records(target: Path) -> dict[str, Record]:
    """Return the records of all launchers, by the names of the runs. Raises as `read_records`."""
    found: dict[str, Record] = {}
    for folder in sorted(target.parent.glob(f"{glob_escape(target.name)}.*/job.json")):
        found |= read_records(target, folder.parent.suffix.removeprefix("."))
    return found


def read_records(target: Path, backend: str = "slurm") -> dict[str, Record]:
    """Return a launcher's records by the names of the runs; {} where it has started nothing.

    Raises UserError where they are damaged.
    """
    path = records_folder(target, backend) / "job.json"
    try:
        stored = json.loads(path.read_text())
        return {name: Record.from_json(values) for name, values in stored.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it to submit again") from None


def write_records(target: Path, records: Sequence[Record], backend: str = "slurm") -> None:
    """Add records to those of earlier starts; a run's newest record replaces an older one."""
    every = read_records(target, backend) | {record.name: record for record in records}
    text = json.dumps({name: asdict(record) for name, record in every.items()}, indent=2)
    write_atomically(records_folder(target, backend) / "job.json", (text + "\n").encode())


def read_outcome(run: Path) -> Outcome | None:
    """Return how the run in a folder ended; None where it has not."""
    return Outcome.from_status(read_status(run))


def is_finished(run: Path) -> bool:
    """Return True if the run in a folder has finished."""
    return recorded_state(read_status(run)) is State.FINISHED


def read_status(run: Path) -> dict[str, Any]:
    """Return status.json of a run folder; {} where there is none (yet)."""
    try:
        return json.loads((run / "status.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}
