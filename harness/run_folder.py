"""A run folder: what it holds, whose it is, and the state of the run (status.json).

config.yaml (resolved) · environment.json · log.jsonl · tensorboard/ · checkpoints/ · status.json
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from harness.atomic_file import write_atomically
from harness.config import Config, curve_differences, dump_config, load_config
from harness.errors import RunFailed, UserError

ROUNDING = ("precision", "compile", "gradient_precision", "loader")  # keys of run: they change it
HEARTBEAT_S = 10.0
NEWS_S = 1.0  # so old may the step in status.json be
STALE_S = 60.0  # a heartbeat this old is of a dead process: several beats, and a network's delay


class Fenced(RunFailed):
    """A newer incarnation of this run has taken over; this one must not write."""


@dataclass(frozen=True)
class Launch:
    """Which launch this process belongs to, and how often it was requeued and restarted.

    `elastic`: under torchrun, which ends all ranks of a launch before it starts them again.
    """

    id: str
    requeues: int
    restarts: int
    elastic: bool

    @classmethod
    def from_environment(cls) -> Launch:
        """torchrun's run id and restart count, or SLURM's job id and requeue count."""
        requeues = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        run_id = os.environ.get("TORCHELASTIC_RUN_ID")
        if run_id is not None:
            if run_id == "none":  # torchrun's default: the agent, our parent, stands for the launch
                run_id = f"{socket.gethostname()}:{os.getppid()}"
            restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
            return cls(run_id, requeues, restarts, elastic=True)
        if "SLURM_JOB_ID" in os.environ:
            return cls(os.environ["SLURM_JOB_ID"], requeues, 0, elastic=False)
        return cls(f"{socket.gethostname()}:{os.getpid()}", 0, 0, elastic=False)

    def follows(self, status: dict[str, Any]) -> bool:
        """Whether the launch that wrote `status` started this process to go on in its place.

        A new number of nodes restarts torchrun's ranks under the same restart count.
        """
        if status.get("launch") != self.id:
            return False
        return self.requeues > status["requeues"] or (
            self.elastic and self.requeues == status["requeues"]
        )


class RunFolder:
    """One run's folder. Only rank 0 writes; every write checks that no newer incarnation does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.log = path / "log.jsonl"
        self.incarnation = 0
        self.environment: dict[str, Any] = {}  # of this process, once it has opened the folder
        self.previous_environment: dict[str, Any] = {}  # of the incarnation before
        self._seen_incarnation = 0
        self._status: dict[str, Any] = {}
        self._progress: dict[str, Any] = {}  # told by the loop, not written yet
        self._lock = threading.RLock()  # the loop and the heartbeat write the status
        self._warned = False

    def read_status(self) -> dict[str, Any]:
        """status.json, or {} where there is none. Raises UserError where it is damaged."""
        try:
            return json.loads((self.path / "status.json").read_text())
        except FileNotFoundError:
            return {}
        except NotADirectoryError:
            raise UserError(
                f"{self.path}: is a file, not a run folder; choose another --out"
            ) from None
        except OSError as error:
            raise UserError(f"{self.path}/status.json: {error.strerror}") from error
        except json.JSONDecodeError as error:
            raise UserError(
                f"{self.path}/status.json: damaged ({error}); remove it to go on"
            ) from error

    def check(self, config: Config, resume: bool, typed: set[str]) -> bool:
        """Whether the run is to be gone on with (True) or started (False); writes nothing.

        `typed` holds the dotted keys given on the command line. Raises UserError where the folder
        exists and was not to be resumed, belongs to another config or is in use.
        """
        if not self.path.exists():
            return False
        status = self.read_status()
        self._seen_incarnation = status.get("incarnation", 0)
        if not (self.path / "config.yaml").exists():
            begun = any(self.path.glob(".incarnation-*"))  # killed before it had written more
            if not begun and (not self.path.is_dir() or any(self.path.iterdir())):
                raise UserError(f"{self.path}: exists and is no run folder; choose another --out")
            return False
        restarted = Launch.from_environment().follows(status)
        if not (resume or restarted):
            raise UserError(
                f"{self.path}: run folder exists; add --resume to go on, or choose another --out"
            )
        stored = load_config(self.path / "config.yaml")
        if differences := curve_differences(stored, config):
            raise UserError(
                f"{self.path}: was run with another config ({'; '.join(differences)}); "
                "give the same values or choose another --out"
            )
        if not restarted:
            self._check_not_in_use(status)
        self._check_rounding(stored, config, typed)
        return True

    def recorded_micro_batch(self, environment: dict[str, Any]) -> int | None:
        """`run.micro_batch` as it was found fastest, if that was on as many ranks of this hardware.

        `environment` is that of this process, as `open` is given it.
        """
        if not (recorded := self._recorded_environment()):
            return None
        here, there = ((e["hardware"]["gpu"], e.get("ranks")) for e in (environment, recorded))
        micro_batch = load_config(self.path / "config.yaml").run.micro_batch
        return micro_batch if here == there and micro_batch != "auto" else None

    def _recorded_environment(self) -> dict[str, Any]:
        """environment.json, or {} where there is none or it is damaged."""
        try:
            return json.loads((self.path / "environment.json").read_text())
        except (OSError, json.JSONDecodeError):
            return {}

    def _check_not_in_use(self, status: dict[str, Any]) -> None:
        if status.get("state") == "running" and _is_fresh(status):
            raise UserError(
                f"{self.path}: in use by process {status['pid']} on {status['host']}, last heard "
                f"of {time.time() - status['heartbeat']:.0f} s ago; stop it first, wait "
                f"{STALE_S:.0f} s if its machine is gone, or choose another --out"
            )

    def _check_rounding(self, stored: Config, config: Config, typed: set[str]) -> None:
        for key in ROUNDING:
            old, new = getattr(stored.run, key), getattr(config.run, key)
            if old != new and f"run.{key}" not in typed:
                raise UserError(
                    f"{self.path}: ran with run.{key} {old}, this resume has {new}, which changes "
                    f"rounding; type run.{key}={new} to go on under it, or run.{key}={old}"
                )

    def open(self, config: Config, environment: dict[str, Any]) -> None:
        """Rank 0: takes the next incarnation number and records config and environment.

        Raises UserError where the folder cannot be written, or another process took the number.
        """
        launch = Launch.from_environment()
        self._status = {
            "incarnation": 0,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "launch": launch.id,
            "requeues": launch.requeues,
            "restarts": launch.restarts,
            "config": str(self.path / "config.yaml"),
        }
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.incarnation = self._status["incarnation"] = self._claim(launch)
            write_atomically(self.path / "config.yaml", dump_config(config).encode())
            self.environment = environment
            self.previous_environment = self._recorded_environment()
            text = json.dumps(environment, indent=2) + "\n"
            write_atomically(self.path / "environment.json", text.encode())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error
        for torn in self.checkpoints.glob(".*.tmp"):  # of a process that was killed
            torn.unlink(missing_ok=True)

    def _claim(self, launch: Launch) -> int:
        """The next incarnation number, which exactly one process can take: its file is created.

        The number before the claim is the one that `check` saw, so of two processes that start
        at once the second finds the first one's claim.
        """
        number = self._seen_incarnation + 1
        while True:
            claim = self.path / f".incarnation-{number:03d}"
            try:
                with open(claim, "x") as file:
                    json.dump(self._status | {"heartbeat": time.time()}, file)
            except FileExistsError:
                holder = json.loads(claim.read_text() or "{}")  # empty: just being written
                if not launch.follows(holder) and _is_fresh(holder):
                    raise UserError(
                        f"{self.path}: another process started on it at the same moment; "
                        "wait for it, or choose another --out"
                    ) from None
                number += 1  # its process died before it wrote its first status
            else:
                for older in sorted(self.path.glob(".incarnation-*"))[:-2]:
                    older.unlink(missing_ok=True)
                return number

    def check_current(self) -> None:
        """Raises Fenced where a newer incarnation has taken over."""
        newest = self.read_status().get("incarnation", 0)
        if newest > self.incarnation:
            raise Fenced(
                f"{self.path}: incarnation {newest} took over; {self.incarnation} ends here"
            )

    def report(self, **values: Any) -> None:
        """Rank 0: values that the heartbeat will write; the loop does not wait for the disk.

        Raises Fenced.
        """
        self._progress = values
        with suppress(UserError):  # a file that cannot be read is told when it is written
            self.check_current()

    def write_status(self, state: str, **values: Any) -> bool:
        """Rank 0: state is running, finished, stopped or failed; also the heartbeat.

        A disk that is full or gone is told once, and the run goes on: false. Raises Fenced.
        """
        with self._lock:
            news = self._progress | values
            self._status |= news | {"state": state, "heartbeat": round(time.time(), 3)}
            text = json.dumps(self._status, indent=2) + "\n"
            try:
                self.check_current()
                write_atomically(self.path / "status.json", text.encode())
            except (OSError, UserError) as error:
                if not self._warned:
                    why = getattr(error, "strerror", None) or error
                    print(f"warning: {self.path}/status.json: not written: {why}", file=sys.stderr)
                self._warned = True
                return False
            self._warned = False
            return True

    @contextmanager
    def heartbeat(self, fenced: Callable[[str], None]) -> Iterator[None]:
        """Within, a thread keeps the status fresh, with what was reported; `fenced` is told of a
        newer incarnation."""
        ended = threading.Event()

        def beat() -> None:
            beaten_s, written = time.monotonic(), self._progress
            while not ended.wait(NEWS_S):
                news = self._progress
                if news is written and time.monotonic() - beaten_s < HEARTBEAT_S:
                    continue
                beaten_s, written = time.monotonic(), news
                try:
                    self.write_status(self._status["state"])
                except Fenced as error:
                    return fenced(str(error))

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(HEARTBEAT_S)  # a disk that hangs does not hold the run


def _is_fresh(status: dict[str, Any]) -> bool:
    """Whether the process that wrote `status` may still be at work."""
    if not status:
        return True
    if status["host"] == socket.gethostname() and not _is_alive(status["pid"]):
        return False  # it died without a word
    return time.time() - status["heartbeat"] < STALE_S


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
