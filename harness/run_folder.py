"""A run folder: what it holds, whose it is, and the state of the run (status.json).

config.yaml (resolved) · environment.json · log.jsonl · tensorboard/ · checkpoints/ · status.json
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint import write_atomically
from harness.config import Config, curve_differences, dump_config, load_config
from harness.errors import RunFailed, UserError

ROUNDING = ("precision", "compile", "loader")  # keys of run: that change rounding


class Fenced(RunFailed):
    """A newer incarnation of this run has taken over; this one must not write."""


@dataclass(frozen=True)
class Launch:
    """Which launch this process belongs to, and how often the launcher restarted it."""

    id: str
    restarts: int

    @classmethod
    def from_environment(cls) -> Launch:
        """torchrun's run id and restart count, or SLURM's job id and requeue count."""
        run_id = os.environ.get("TORCHELASTIC_RUN_ID")
        if run_id is not None:
            if run_id == "none":  # torchrun's default: the agent, our parent, stands for the launch
                run_id = f"{socket.gethostname()}:{os.getppid()}"
            return cls(run_id, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
        if "SLURM_JOB_ID" in os.environ:
            return cls(os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0")))
        return cls(f"{socket.gethostname()}:{os.getpid()}", 0)


class RunFolder:
    """One run's folder. Only rank 0 writes; every write checks that no newer incarnation does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.log = path / "log.jsonl"
        self.incarnation = 0
        self._status: dict[str, Any] = {}

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
        if not (self.path / "config.yaml").exists():
            if not self.path.is_dir() or any(self.path.iterdir()):
                raise UserError(f"{self.path}: exists and is no run folder; choose another --out")
            return False
        launch = Launch.from_environment()
        restarted = launch.restarts > status.get("restarts", 0) and launch.id == status.get(
            "launch"
        )
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
            self._check_not_in_use(status, config.run.hang_timeout_s)
        self._check_rounding(stored, config, typed)
        return True

    def _check_not_in_use(self, status: dict[str, Any], hang_timeout_s: float) -> None:
        if status.get("state") != "running":
            return
        here = status["host"] == socket.gethostname()
        if here and not _is_alive(status["pid"]):
            return  # it died without a word
        age_s = time.time() - status["heartbeat"]
        if age_s < hang_timeout_s:
            raise UserError(
                f"{self.path}: in use by process {status['pid']} on {status['host']}, "
                f"last heard of {age_s:.0f} s ago; stop it first, or choose another --out"
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
        """Rank 0: takes the next incarnation number and records config and environment."""
        status = self.read_status()
        launch = Launch.from_environment()
        self.incarnation = status.get("incarnation", 0) + 1
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "config.yaml", dump_config(config).encode())
            text = json.dumps(environment, indent=2) + "\n"
            write_atomically(self.path / "environment.json", text.encode())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error
        self._status = {
            "incarnation": self.incarnation,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "launch": launch.id,
            "restarts": launch.restarts,
            "config": str(self.path / "config.yaml"),
        }

    def check_current(self) -> None:
        """Raises Fenced where a newer incarnation has taken over."""
        newest = self.read_status().get("incarnation", 0)
        if newest > self.incarnation:
            raise Fenced(
                f"{self.path}: incarnation {newest} took over; {self.incarnation} ends here"
            )

    def write_status(self, state: str, **values: Any) -> None:
        """Rank 0: state is running, finished, stopped or failed; also the heartbeat."""
        self.check_current()
        self._status |= values | {"state": state, "heartbeat": round(time.time(), 3)}
        text = json.dumps(self._status, indent=2) + "\n"
        write_atomically(self.path / "status.json", text.encode())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware, git commit and command of this process."""
    import numpy
    import torchvision

    from harness import __version__

    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    cuda = device.type == "cuda"
    return {
        "versions": {
            "harness": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": numpy.__version__,
            "cuda": torch.version.cuda if cuda else None,
        },
        "hardware": {
            "host": socket.gethostname(),
            "cpus": os.cpu_count(),
            "cpu": platform.processor() or platform.machine(),
            "gpu": torch.cuda.get_device_name(device) if cuda else None,
            "gpus": torch.cuda.device_count() if cuda else 0,
        },
        "git_commit": commit.stdout.strip() or None,
        "command": sys.argv,
    }
