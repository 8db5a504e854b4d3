"""The notes of a job's tasks: what went wrong, each task in a file of its own.

Appends of several nodes to one file would mix or get lost on NFS. So the leader alone writes the
merged log, and includes the notes of the others; `launch status` reads the causes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.atomic_file import write_atomically


@dataclass(frozen=True)
class Note:
    """Text for the merged log, and the task's error where it is one (else "")."""

    text: str
    cause: str = ""


@dataclass(frozen=True)
class StartNotes:
    """The notes of one start of a job, in the folder NAME.notes beside NAME.log.

    `job_id` is 15 or, in an array, 12_3; `restarts` is how often the job was requeued before.
    """

    log: Path
    job_id: str
    restarts: int

    @property
    def _folder(self) -> Path:
        return self.log.with_suffix(".notes")

    def _path(self, of: str) -> Path:
        return self._folder / f"{self.job_id}-{self.restarts}-{of}"

    def write(self, task: str, note: Note) -> None:
        """Append a note of a task; the file is created with the first one."""
        path = self._path(f"{task}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(asdict(note)) + "\n")

    def write_cause(self, cause: str) -> None:
        """Record why the start ended."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path("end.json"), json.dumps({"cause": cause}).encode())

    def read(self) -> dict[Path, list[Note]]:
        """Return the whole notes of the tasks by file; {} where no task has any."""
        found = {}
        for path in sorted(self._folder.glob(f"{self.job_id}-{self.restarts}-*.jsonl")):
            with contextlib.suppress(OSError):
                found[path] = list(_parse(path.read_text()))
        return found

    def cause(self) -> str:
        """Return why the start ended, by the leader or else by another task; "" if unknown."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return str(json.loads(self._path("end.json").read_text())["cause"])
        causes = (note.cause for notes in self.read().values() for note in notes)
        return next(filter(None, causes), "")


def _parse(text: str) -> Iterator[Note]:
    for line in text.splitlines():
        with contextlib.suppress(ValueError, TypeError):  # only half written
            yield Note(**json.loads(line))
