"""The merged log of a job: all of rank 0, and what went wrong on any other rank."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO

from launch.slurm.notes import Note, StartNotes
from launch.slurm.task_place import TaskPlace

PIPE_LINGERS_S = 5.0  # after a child's end, as its own children may hold its output open
COLLECT_EVERY_S = 5.0
LATE_NOTES_S = 2.0  # how long the leader waits at the end for notes of other tasks
TORCH_PREFIX = re.compile(r"^\[rank\d+\]: ?")
BAD_LINE = re.compile(r"error:|Traceback|Fatal Python error|E\d{4} ")  # the last one: torchrun's


class TaskLog:
    """A task's part in the merged log: notes of what goes wrong, for the leader to include."""

    def __init__(self, path: str, place: TaskPlace) -> None:
        self._notes = StartNotes(Path(path), place.job_id, place.restarts)
        self._rank, self._name = str(place.rank), place.name
        self._in_traceback = False
        self.complaint = ""  # the last error that this task's ranks reported

    def line(self, text: str) -> None:
        """Log a line of the launcher itself."""
        self._write(Note(f"--- {text}\n"))

    def error(self, text: str) -> None:
        """Log an error of this task, and print it on its own standard error."""
        print(f"error: {text}", file=sys.stderr, flush=True)
        self._write(Note(f"error: {self._name}: {text}\n", f"{self._name}: {text}"))

    def note_cause(self, text: str) -> None:
        """Keep what torchrun found to be the first error of its ranks."""
        self.complaint = text

    def output(self, text: str) -> None:
        """Log standard output, which is the leader's alone."""

    def errors(self, text: str) -> None:
        """Log standard error: the leader's whole, other tasks' error lines and tracebacks."""
        plain = TORCH_PREFIX.sub("", text)
        # a traceback includes the line that it ends in
        wanted = self._in_traceback or BAD_LINE.match(plain)
        within = self._in_traceback and plain.startswith(" ")
        self._in_traceback = within or plain.startswith("Traceback")
        if wanted and not self._in_traceback:
            self.complaint = plain.strip().removeprefix("error: ")
        self._standard_error(text, wanted=bool(wanted))

    def collect(self) -> None:
        """Include the notes of the other tasks, which the leader does every few seconds."""

    def close(self, failed: bool) -> None:
        """Include the last notes; where the start `failed`, a leader waits for the cause."""

    def _standard_error(self, text: str, wanted: bool) -> None:
        if wanted:
            self._write(Note(f"[{self._name}] {text}"))

    def _write(self, note: Note) -> None:
        self._notes.write(self._rank, note)


class MergedLog(TaskLog):
    """The log for people, which the leader alone writes."""

    def __init__(self, path: str, place: TaskPlace) -> None:
        super().__init__(path, place)
        self._file = open(  # noqa: SIM115 (closed by the end of the process)
            path, "a", encoding="utf-8", errors="surrogateescape", buffering=1
        )
        self._collected: Counter[Path] = Counter()  # notes by file
        self._collected_at_s = time.monotonic()
        self._own_cause = self._others_cause = self._kept_cause = ""

    def output(self, text: str) -> None:
        self._file.write(text)

    def collect(self) -> None:
        if time.monotonic() - self._collected_at_s > COLLECT_EVERY_S:
            self._collected_at_s = time.monotonic()
            self._collect()

    def close(self, failed: bool) -> None:
        self._collect()
        end_s = time.monotonic() + LATE_NOTES_S
        while failed and not self._others_cause and time.monotonic() < end_s:
            time.sleep(0.1)
            self._collect()

    def _collect(self) -> None:
        for path, notes in self._notes.read().items():
            for note in notes[self._collected[path] :]:
                self._file.write(note.text)
                self._others_cause = self._others_cause or note.cause
            self._collected[path] = len(notes)
        self._keep_cause()

    def _standard_error(self, text: str, wanted: bool) -> None:
        self._file.write(text)

    def _write(self, note: Note) -> None:
        self._file.write(note.text)
        self._own_cause = note.cause or self._own_cause
        self._keep_cause()

    def _keep_cause(self) -> None:
        cause = self._others_cause or self._own_cause  # the leader only hears of others' failures
        if cause != self._kept_cause:
            self._kept_cause = cause
            self._notes.write_cause(cause)


def open_log(path: str, place: TaskPlace) -> TaskLog:
    """Return the log at `path` as the task at `place` writes it."""
    return MergedLog(path, place) if place.leader else TaskLog(path, place)


class Pump:
    """Copies a child's stream, line by line, to the raw log and to the merged one."""

    def __init__(self, source: IO[bytes], raw: IO[str], merged: Callable[[str], None]) -> None:
        self._thread = threading.Thread(target=self._copy, args=(source, raw, merged), daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._thread.join(PIPE_LINGERS_S)

    def _copy(self, source: IO[bytes], raw: IO[str], merged: Callable[[str], None]) -> None:
        for line in source:
            text = line.decode(errors="replace").rstrip("\n") + "\n"
            raw.write(text)
            raw.flush()
            merged(text)
