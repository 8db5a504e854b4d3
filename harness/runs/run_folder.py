"""A run folder: what it holds, whose it is, and the state of the run (status.json).

config.yaml (resolved) · environment.json · log.jsonl · tensorboard/ · checkpoints/ · status.json
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from harness.atomic_file import write_atomically
from harness.config.loading import curve_differences, dump_config, load_config
from harness.config.reference import names_with, value_of
from harness.config.schema import Config
from harness.config.section import Effect
from harness.errors import UserError
from harness.outcome import State
from harness.runs.checkpoint import list_checkpoints
from harness.runs.ownership import Fenced, Launch, RunOwnership

HEARTBEAT_S = 10.0
NEWS_S = 1.0  # the greatest age of the step in status.json


class RunFolder:
    """One run's folder. Only rank 0 writes; each write checks that it still owns the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.log = path / "log.jsonl"
        self.ownership = RunOwnership(path)
        self.environment: dict[str, Any] = {}  # of this process, once it has opened the folder
        self.previous_environment: dict[str, Any] = {}  # of the previous incarnation
        self._status: dict[str, Any] = {"beats": 0}
        self._progress: dict[str, Any] = {}  # reported by the loop, not written yet
        self._lock = threading.RLock()  # the loop and the heartbeat write the status
        self._warned = False

    def read_status(self) -> dict[str, Any]:
        """Return status.json, or {} where there is none. Raises UserError where it is damaged."""
        return self.ownership.read_status()

    @property
    def incarnation(self) -> int:
        """The incarnation of the run that this process is; 0 until `open`."""
        return self.ownership.incarnation

    def check(self, config: Config, resume: bool, cli_overrides: set[str]) -> bool:
        """Return True to resume the run, False to start it; write nothing.

        `cli_overrides` holds the dotted keys given on the command line. Raises UserError where the
        folder exists and was not to be resumed, or belongs to another config.
        """
        if not self.path.exists():
            return False
        if not (self.path / "config.yaml").exists():
            self._check_without_config()
            return False
        restarted = Launch.from_environment().follows(self.ownership.owner())
        if not (resume or restarted):
            raise UserError(
                f"{self.path}: run folder exists; add --resume to continue, or choose another --out"
            )
        stored = load_config(self.path / "config.yaml")
        if differences := curve_differences(stored, config):
            raise UserError(
                f"{self.path}: was run with another config ({'; '.join(differences)}); "
                "give the same values or choose another --out"
            )
        self._check_typed(stored, config, cli_overrides)
        return True

    def _check_without_config(self) -> None:
        if list_checkpoints(self.checkpoints):
            raise UserError(
                f"{self.path}: holds checkpoints, but its config.yaml is missing; copy the run's "
                "config there to continue, or choose another --out"
            )
        begun = any(self.path.glob(".incarnation-*"))  # killed before it had written more
        if not begun and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.path}: exists and is no run folder; choose another --out")

    def recorded_micro_batch(self, environment: dict[str, Any]) -> int | None:
        """Return the `run.micro_batch` that was measured on as many ranks of the same hardware.

        None where there is no such record. `environment` is that of this process.
        """
        if not (recorded := self._recorded_environment()):
            return None
        here, there = ((e["hardware"]["gpu"], e.get("ranks")) for e in (environment, recorded))
        micro_batch = load_config(self.path / "config.yaml").run.micro_batch
        return micro_batch if here == there and micro_batch != "auto" else None

    def recorded_sums(self) -> str:
        """Return how the run in this folder makes its sums: "exact" or "fast"."""
        return recorded_sums(load_config(self.path / "config.yaml"))

    def _recorded_environment(self) -> dict[str, Any]:
        """Return environment.json, or {} where there is none or it is damaged."""
        try:
            return json.loads((self.path / "environment.json").read_text())
        except (OSError, json.JSONDecodeError):
            return {}

    def _check_typed(self, stored: Config, config: Config, cli_overrides: set[str]) -> None:
        """Refuse changes that only the command line may make."""
        effects = {Effect.ROUNDING: "rounding", Effect.EVALUATION: "the validation errors"}
        for effect, what in effects.items():
            for name in names_with(effect):
                old, new = value_of(stored, name), value_of(config, name)
                if name == "run.sums":
                    old = recorded_sums(stored)
                    new = old if new == "auto" else new  # a resume keeps what was measured
                if old != new and name not in cli_overrides:
                    raise UserError(
                        f"{self.path}: ran with {name} {old}, this resume has {new}, which changes "
                        f"{what}; type {name}={new} to continue under it, or {name}={old}"
                    )

    def open(self, config: Config, environment: dict[str, Any]) -> None:
        """Take the next incarnation number and record config and environment, on rank 0.

        Raises UserError where the folder cannot be written, or another process took the number.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._status |= self.ownership.claim() | {
                "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "config": str(self.path / "config.yaml"),
            }
            write_atomically(self.path / "config.yaml", dump_config(config).encode())
            self.environment = environment
            self.previous_environment = self._recorded_environment()
            text = json.dumps(environment, indent=2) + "\n"
            write_atomically(self.path / "environment.json", text.encode())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error
        for torn in self.checkpoints.glob(".*.tmp"):  # of a process that was killed
            torn.unlink(missing_ok=True)

    def check_current(self) -> None:
        """Raise Fenced where this incarnation has lost the folder."""
        self.ownership.check()

    def report(self, **values: Any) -> None:
        """Take values that the heartbeat will write, so that the loop does not wait for the disk.

        Raises Fenced.
        """
        self._progress = values
        with suppress(UserError):  # an unreadable file is reported when it is written
            self.check_current()

    def write_status(self, state: State, **values: object) -> bool:
        """Write the state and `values` from rank 0; this is the heartbeat, too.

        A disk that is full or gone is reported once and returns False, and the run continues.
        Raises Fenced.
        """
        with self._lock:
            news = self._progress | values
            # observers watch the count; the time is for people, as clocks may jump or stop
            beats = {"heartbeat": round(time.time(), 3), "beats": self._status["beats"] + 1}
            self._status |= news | {"state": state.value} | beats
            text = json.dumps(self._status, indent=2) + "\n"
            try:
                self.check_current()
                write_atomically(self.path / "status.json", text.encode())
            except (OSError, UserError) as error:
                if not self._warned:
                    why = getattr(error, "strerror", None) or error
                    print(f"warning: {self.path}/status.json: not written: {why}", file=sys.stderr)
                self._warned = True
                with suppress(OSError):
                    os.utime(self.path / "status.json")  # a beat that needs no disk space
                return False
            self._warned = False
            return True

    @contextmanager
    def heartbeat(self, fenced: Callable[[str], None]) -> Iterator[None]:
        """Within, a thread keeps the status fresh and writes what was reported.

        `fenced` is called with the reason once a newer incarnation has taken over.
        """
        ended = threading.Event()

        def beat() -> None:
            beaten_s, written = time.monotonic(), self._progress
            while not ended.wait(NEWS_S):
                news = self._progress
                if news is written and time.monotonic() - beaten_s < HEARTBEAT_S:
                    continue
                beaten_s, written = time.monotonic(), news
                try:
                    self.write_status(State(self._status["state"]))
                except Fenced as error:
                    return fenced(str(error))

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(HEARTBEAT_S)  # do not wait for a disk that hangs


def recorded_sums(stored: Config) -> str:
    """Return `run.sums` as the stored config's run made them; older runs knew fast ones only."""
    return "fast" if stored.run.sums == "auto" else stored.run.sums
