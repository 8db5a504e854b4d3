"""What was submitted for a run or a study: a folder NAME.slurm beside it.

job.json · for each run its config, frozen, and its merged log · submitit's scripts and raw logs
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.errors import UserError


@dataclass(frozen=True)
class Record:
    """One submitted run. `after`: the job that it waits for."""

    name: str
    run: str
    config: str
    log: str
    job_id: str
    requeues: int
    after: str | None = None


def records_folder(target: Path) -> Path:
    """That of a run folder or a study's folder."""
    return target.with_name(f"{target.name}.slurm")


def read_records(target: Path) -> dict[str, Record]:
    """By the runs' names; {} where nothing was submitted. Raises UserError where it is damaged."""
    path = records_folder(target) / "job.json"
    try:
        return {name: Record(**values) for name, values in json.loads(path.read_text()).items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it to submit anew") from None


def write_records(target: Path, records: list[Record]) -> None:
    """Adds to what was submitted before; a run's newest record stands."""
    every = read_records(target) | {record.name: record for record in records}
    text = json.dumps({name: asdict(record) for name, record in every.items()}, indent=2)
    (records_folder(target) / "job.json").write_text(text + "\n")
