"""The merged log of a job: all of rank 0, and what went wrong on any other rank."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from typing import IO

from launch.slurm.task_place import TaskPlace

PIPE_LINGERS_S = 5.0  # after a child's end, as its own children may hold its output open
TORCH_PREFIX = re.compile(r"^\[rank\d+\]: ?")
BAD_LINE = re.compile(r"error:|Traceback|Fatal Python error|E\d{4} ")  # the last one: torchrun's


class MergedLog:
    """The log for people: all of rank 0, and what went wrong on any other rank."""

    def __init__(self, path: str, place: TaskPlace) -> None:
        self._file = open(  # noqa: SIM115 (closed by the end of the process)
            path, "a", encoding="utf-8", errors="surrogateescape", buffering=1
        )
        self._leader, self._place = place.leader, place.name
        self._in_traceback = False
        self.complaint = ""  # the last error that this task's ranks reported

    def line(self, text: str) -> None:
        """Log a line of the launcher itself."""
        self._file.write(f"--- {text}\n")

    def error(self, text: str) -> None:
        """Log an error of this task, and print it on its own standard error."""
        print(f"error: {text}", file=sys.stderr, flush=True)
        self._file.write(f"error: {self._place}: {text}\n")

    def note_cause(self, text: str) -> None:
        """Keep what torchrun found to be the first error of its ranks."""
        self.complaint = text

    def output(self, text: str) -> None:
        """Log standard output, if this task is the leader."""
        if self._leader:
            self._file.write(text)

    def errors(self, text: str) -> None:
        """Log standard error: the leader's whole, other tasks' error lines and tracebacks."""
        plain = TORCH_PREFIX.sub("", text)
        # a traceback includes the line that it ends in
        wanted = self._in_traceback or BAD_LINE.match(plain)
        within = self._in_traceback and plain.startswith(" ")
        self._in_traceback = within or plain.startswith("Traceback")
        if wanted and not self._in_traceback:
            self.complaint = plain.strip().removeprefix("error: ")
        if self._leader:
            self._file.write(text)
        elif wanted:
            self._file.write(f"[{self._place}] {text}")


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
