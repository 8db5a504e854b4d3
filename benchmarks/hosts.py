"""Hosts on this machine: network namespaces at one switch, each link shaped. Needs root.

Addresses are 10.78.0.x and known inside the namespaces only; nothing of the machine's own network
is touched, and ending the context removes every namespace, with its processes and links.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from types import TracebackType

from benchmarks.delaying_switch import DelayingSwitch

INTERFACE, NETWORK = "eth0", "10.78.0"
HIDDEN = "/usr/sbin:/sbin"  # where Debian keeps ip and tc, not on every user's PATH
PATH = f"{os.environ.get('PATH', '')}:{HIDDEN}"
MTU = "9000"  # bytes: fewer frames, and less work for two cores
QUEUE = "500ms"  # long enough that TCP never meets a full queue: losses are not modelled


def missing() -> str:
    """Why there can be no hosts here; empty where there can."""
    lost = [name for name in ("ip", "tc") if shutil.which(name, path=PATH) is None]
    if lost:
        return f"no {', '.join(lost)}: apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"scaling-{os.getpid()}-try"
    try:
        run("ip", "netns", "add", name)
        run("ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", "lo", *shape(100.0))
    except RuntimeError as error:
        return f"namespaces or shaping do not work here: {error}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, env=_environment())
    return ""


def run(*command: str) -> str:
    """The output of a command; raises RuntimeError with what it said where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=30)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _environment() -> dict[str, str]:
    return os.environ | {"PATH": PATH}


def shape(mbit_per_s: float) -> list[str]:
    """tc's words for an interface that sends so fast."""
    # a burst holds one offloaded packet of 64 KB, or half a millisecond's bytes
    burst = max(65536, round(mbit_per_s * 1e6 / 8 * 0.0005))
    return f"root tbf rate {mbit_per_s}mbit burst {burst} latency {QUEUE}".split()


def shape_this_host(mbit_per_s: float) -> None:
    """To be called by a process inside a host. Raises RuntimeError where tc refuses."""
    run("tc", "qdisc", "replace", "dev", INTERFACE, *shape(mbit_per_s))


class Hosts(AbstractContextManager["Hosts"]):
    """`count` namespaces with an address each, at a bridge in a namespace of its own, or at a
    DelayingSwitch where what they send is to arrive `delay_ms` later."""

    def __init__(self, count: int, delay_ms: float = 0.0) -> None:
        self.mark, self.delay_ms = f"scaling-{os.getpid()}", delay_ms
        self.hub, self.names = f"{self.mark}-hub", [f"{self.mark}-{i}" for i in range(count)]
        self.switch: DelayingSwitch | None = None

    def __enter__(self) -> Hosts:
        try:
            for name in (self.hub, *self.names):
                run("ip", "netns", "add", name)
            if self.delay_ms:
                self._add_switch()
            else:
                self._add_bridge()
            for number, name in enumerate(self.names):
                inside = ("ip", "-n", name)
                run(*inside, "address", "add", f"{self.address(number)}/24", "dev", INTERFACE)
                run(*inside, "link", "set", INTERFACE, "mtu", MTU)
                for interface in ("lo", INTERFACE):
                    run(*inside, "link", "set", interface, "up")
                # a step's first bytes are not to start slowly, as clusters set it too
                setting = "net.ipv4.tcp_slow_start_after_idle=0"
                run("ip", "netns", "exec", name, "sysctl", "-qw", setting)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _add_bridge(self) -> None:
        hub = ("ip", "-n", self.hub)
        run(*hub, "link", "add", "bridge", "type", "bridge")
        run(*hub, "link", "set", "bridge", "up")
        for number, name in enumerate(self.names):
            port = f"port{number}"
            peer = ("peer", "name", port, "mtu", MTU, "netns", self.hub)
            run("ip", "link", "add", INTERFACE, "netns", name, "type", "veth", *peer)
            run(*hub, "link", "set", port, "master", "bridge", "up")

    def _add_switch(self) -> None:
        taps = [f"tap{os.getpid()}-{number}" for number in range(len(self.names))]
        self.switch = DelayingSwitch(taps, self.delay_ms / 1000)
        for tap, name in zip(taps, self.names, strict=True):
            run("ip", "link", "set", tap, "netns", name, "name", INTERFACE)
        self.switch.start()

    def address(self, number: int) -> str:
        """The IPv4 address of a host."""
        return f"{NETWORK}.{number + 1}"

    def start(
        self, number: int, command: Sequence[str], environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Starts a command on a host."""
        inside = ("ip", "netns", "exec", self.names[number])
        return subprocess.Popen([*inside, *command], env=_environment() | environment)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name in (*self.names, self.hub):
            for pid in subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, env=_environment()
            ).stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, env=_environment())
        if self.switch is not None:
            self.switch.stop()
