"""The ownership of a run folder: incarnation numbers, and whether the owner is alive."""

from __future__ import annotations

import json
import os
import secrets
import time
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.outcome import RunFailed, Stopped
from harness.resilience.stopping import StopRequest
from harness.runs.checkpoint import checkpoint_key, list_checkpoints
from harness.runs.process_identity import ProcessIdentity

# A file replaced on an NFS server may stay hidden from another client for 60 s (acdirmax, nfs(5)).
# The rest is for the heartbeat's interval of 10 s and for a slow write.
WATCH_S = 75.0
POLL_S = 0.5


class Fenced(RunFailed):
    """A newer incarnation of this run has taken over; this one must not write."""


@dataclass(frozen=True)
class Launch:
    """The launch this process belongs to, and how often it was requeued and restarted.

    `elastic`: under torchrun, which ends all ranks of a launch before it starts them again.
    """

    id: str
    requeues: int
    restarts: int
    elastic: bool

    @classmethod
    def from_environment(cls) -> Launch:
        """Read torchrun's run id and restart count, or SLURM's job id and requeue count."""
        requeues = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        run_id = os.environ.get("TORCHELASTIC_RUN_ID")
        if run_id is not None:
            if run_id == "none":  # torchrun's default, so its agent, our parent, names the launch
                run_id = _unique_name(os.getppid())
            restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
            return cls(run_id, requeues, restarts, elastic=True)
        if "SLURM_JOB_ID" in os.environ:
            return cls(os.environ["SLURM_JOB_ID"], requeues, 0, elastic=False)
        return cls(_unique_name(os.getpid()), 0, 0, elastic=False)

    def follows(self, record: dict[str, Any]) -> bool:
        """Return True where the launch that wrote `record` started this process to continue it.

        A new number of nodes restarts torchrun's ranks under the same restart count.
        """
        if record.get("launch") != self.id:
            return False
        return self.requeues > record["requeues"] or (
            self.elastic and self.requeues == record["requeues"]
        )


def _unique_name(pid: int) -> str:
    return ":".join(map(str, astuple(ProcessIdentity.of(pid))))


class RunOwnership:
    """The right to write to a run folder, which belongs to the newest incarnation of the run.

    Incarnation N begins by creating the file .incarnation-N, which only one process can do. The
    file names the process until its first status.json, which then serves as its heartbeat. `token`
    is a random number that distinguishes this incarnation from any other of the same number.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ended = 0  # the newest incarnation that is known to have ended
        self.incarnation = 0  # this process' own, once claimed
        self.token = secrets.token_hex(8)

    def read_status(self) -> dict[str, Any]:
        """Return status.json, or {} where there is none. Raises UserError where it is damaged."""
        path = self._folder / "status.json"
        try:
            status = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except NotADirectoryError:
            raise UserError(
                f"{self._folder}: is a file, not a run folder; choose another --out"
            ) from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error}); remove it to continue") from error
        if not isinstance(status, dict):
            raise UserError(f"{path}: damaged (not a JSON object); remove it to continue")
        return status

    def owner(self) -> dict[str, Any]:
        """Return the newest incarnation's status, or its claim before it has one; {} at first."""
        status, claims = self.read_status(), self._claims()
        if not claims or max(claims) <= status.get("incarnation", 0):
            return status
        return _read_claim(claims[max(claims)]) | {
            "incarnation": max(claims),
            "state": "starting",
        }

    def wait_until_free(self, stop: StopRequest) -> None:
        """Return once no other process can be at work in the folder; announce a wait.

        The owner's own launch takes over immediately, and so does anybody once the owner is known
        to have ended. Otherwise its heartbeat is watched for up to `WATCH_S` on this process'
        monotonic clock: any change shows that it lives. Times in the folder are never compared with
        a clock, as two hosts' clocks may differ by any amount.

        Raises UserError where the owner lives, Stopped where a signal ends the wait.
        """
        owner = self.owner()
        if not Launch.from_environment().follows(owner):
            self._watch(owner, stop)
        numbers = [self.owner().get("incarnation", 0), *self._claims()]
        # status and claims may be missing where small files were purged or not copied
        numbers += [checkpoint_key(p)[0] for p in list_checkpoints(self._folder / "checkpoints")]
        self._ended = max(numbers)

    def _watch(self, owner: dict[str, Any], stop: StopRequest) -> None:
        process, before, begun_s = ProcessIdentity.recorded(owner), self._signs(), time.monotonic()
        announced = False
        while _is_at_work(owner) and not process.has_ended():
            if not announced:
                print(
                    f"{self._folder}: waiting up to {WATCH_S:.0f} s to see whether {process} is "
                    "still running it",
                    flush=True,
                )
                announced = True
            time.sleep(POLL_S)
            if stop.signal is not None:
                raise Stopped(f"{self._folder}: stopped while waiting, nothing was written")
            if self._signs() != before:
                owner = self.owner()
                if _is_at_work(owner):
                    raise UserError(
                        f"{self._folder}: in use by {ProcessIdentity.recorded(owner)}; stop it "
                        "first, or choose another --out"
                    )
            if time.monotonic() - begun_s > WATCH_S:
                return

    def _signs(self) -> dict[str, tuple[int, bytes]]:
        """Return all that a living owner changes, times and contents, to compare for equality."""
        signs = {}
        for path in (self._folder / "status.json", *self._claims().values()):
            with suppress(OSError):
                signs[path.name] = path.stat().st_mtime_ns, path.read_bytes()
        return signs

    def claim(self) -> dict[str, Any]:
        """Take the next incarnation number; return the record that identifies this process.

        Raises UserError where another process took it since `wait_until_free`, and OSError.
        """
        launch, number = Launch.from_environment(), self._ended + 1
        record = {
            **ProcessIdentity.of(os.getpid()).as_record(),
            "token": self.token,
            "launch": launch.id,
            "requeues": launch.requeues,
            "restarts": launch.restarts,
        }
        while True:
            path = self._claim_path(number)
            try:
                with open(path, "x") as file:
                    json.dump(record, file)
                break
            except FileExistsError:
                if not launch.follows(_read_claim(path)):
                    raise UserError(
                        f"{self._folder}: another process started on it at the same moment; "
                        "wait for it, or choose another --out"
                    ) from None
                number += 1  # of a rank that the same launch has replaced by this one
        self.incarnation = number
        claims = self._claims()
        for older in sorted(claims)[:-2]:
            claims[older].unlink(missing_ok=True)
        return record | {"incarnation": number}

    def check(self) -> None:
        """Raise Fenced where this incarnation has lost the folder."""
        status = self.read_status()
        if (newest := status.get("incarnation", 0)) > self.incarnation:
            raise Fenced(
                f"{self._folder}: incarnation {newest} took over; {self.incarnation} ends here"
            )
        if self._is_replaced(status):
            raise Fenced(f"{self._folder}: another run was started in its place; this one ends")

    def _is_replaced(self, status: dict[str, Any]) -> bool:
        """Return True where the folder was removed and another run has begun under its name."""
        try:
            return self.token not in self._claim_path(self.incarnation).read_text()
        except OSError:  # removed with the folder, or by hand
            return bool(status) and status.get("token") != self.token

    def _claims(self) -> dict[int, Path]:
        found = self._folder.glob(".incarnation-*")
        return {int(p.name.partition("-")[2]): p for p in found if p.name[13:].isdecimal()}

    def _claim_path(self, number: int) -> Path:
        return self._folder / f".incarnation-{number:03d}"


def _read_claim(path: Path) -> dict[str, Any]:
    """Read a claim; {} where its process is still writing it, or was killed while it did."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _is_at_work(record: dict[str, Any]) -> bool:
    """Return True unless the record says how its incarnation ended, or there was none."""
    return record.get("state") in ("running", "starting")
