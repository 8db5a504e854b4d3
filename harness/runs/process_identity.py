"""The identity of a process in a record, and whether it has provably ended."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # a random number that the kernel draws at boot


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, distinguished from every other on any machine at any time.

    Host names and process numbers repeat: cloned machines share a name, and the first process of
    every container is number 1. The boot and the process number's namespace say where `pid` has a
    meaning, and the start time (clock ticks since boot) says which process of that number is
    meant. Values that this system does not provide, or that an older version did not record, are
    None and prove nothing.
    """

    host: str
    pid: int
    boot_id: str | None = None
    pid_namespace: str | None = None
    started_ticks: int | None = None

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity:
        """Describe a process of this machine and namespace."""
        boot_id: str | None = None
        namespace: str | None = None
        with suppress(OSError):  # not Linux, or a container that hides them
            boot_id, namespace = BOOT_ID.read_text().strip(), os.readlink("/proc/self/ns/pid")
        _, started_ticks = _state_and_start(pid)
        return cls(socket.gethostname(), pid, boot_id, namespace, started_ticks)

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> ProcessIdentity:
        """Read back what `as_record` wrote, or the host and pid of older versions."""
        names = ("boot_id", "pid_namespace", "started_ticks")
        known = {name: record.get(name) for name in names}
        return cls(record.get("host", "unknown"), record.get("pid", 0), **known)

    def as_record(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def has_ended(self) -> bool:
        """Return True only where this can be proved; False means alive or unknown.

        A process of another pid namespace is invisible here, so its absence proves nothing: two
        containers of one host have the same boot id, and in each of them the run is process 1. A
        container that was restarted has a new namespace, so its former process is not provably
        gone either. Only the heartbeat distinguishes these cases: `RunOwnership.wait_until_free`.
        The kernel reuses a namespace's number only after all of its processes have ended.
        """
        here = ProcessIdentity.of(os.getpid())
        machine = (self.boot_id, self.pid_namespace)
        if None in machine or machine != (here.boot_id, here.pid_namespace):
            return False
        try:
            os.kill(self.pid, 0)  # /proc alone may hide the processes of other users
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        state, started_ticks = _state_and_start(self.pid)
        if None in (started_ticks, self.started_ticks):
            return False
        return state in ("Z", "X") or started_ticks != self.started_ticks


def _state_and_start(pid: int) -> tuple[str | None, int | None]:
    """Return state letter and start time, fields 3 and 22 of /proc/PID/stat (proc(5)).

    Both are None where /proc is unreadable or belongs to another pid namespace, in which the same
    number is another process.
    """
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return None, None
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        fields = stat.rpartition(")")[2].split()  # the name in field 2 may hold spaces and brackets
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return None, None
