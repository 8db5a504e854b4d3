"""Hosts on this machine: network namespaces at one switch, with shaped links. Needs root.

Addresses are 10.78.0.x, known only inside the namespaces; the machine's own network is not
touched, and the end of the context removes every namespace, with its processes and links.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from types import TracebackType

from benchmarks.delaying_switch import DelayingSwitch

INTERFACE, NETWORK = "eth0", "10.78.0"
TRUNK = ("up", "down")  # the ends of a node's link
HIDDEN = "/usr/sbin:/sbin"  # where Debian keeps ip and tc, not on every user's PATH
PATH = f"{os.environ.get('PATH', '')}:{HIDDEN}"
TCP = (
    "net.ipv4.tcp_slow_start_after_idle=0",  # for a step's first bytes, as on clusters
    "net.ipv4.tcp_congestion_control=reno",  # bbr, some machines' default, pauses to probe
)
MTU = "9000"  # bytes: fewer frames, and less work for two cores
FRAME = 10_000  # bytes: the least burst, one frame; larger packets are segmented
QUEUE = "2s"  # so long that TCP never fills the queue: losses are not modelled


def missing() -> str:
    """Return why hosts are impossible here; "" if they are possible."""
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
        return f"namespaces or traffic shaping do not work here: {error}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, env=_environment())
    return ""


def run(*command: str) -> str:
    """Return the output of a command; raise RuntimeError with its error output if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=30)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _environment() -> dict[str, str]:
    return os.environ | {"PATH": PATH}


def shape(mbit_per_s: float, least_burst: int = 65536) -> list[str]:
    """Return tc's arguments for an interface of this speed."""
    # a burst is one offloaded packet of 64 KB, or the bytes of half a millisecond
    burst = max(least_burst, round(mbit_per_s * 1e6 / 8 * 0.0005))
    return f"root tbf rate {mbit_per_s}mbit burst {burst} latency {QUEUE}".split()


def shape_this_host(mbit_per_s: float) -> None:
    """Shape the link of the calling process's host. Raises RuntimeError if tc refuses."""
    run("tc", "qdisc", "replace", "dev", INTERFACE, *shape(mbit_per_s))


@dataclass(frozen=True)
class Interface:
    """One end of a link, whose outgoing traffic can be shaped."""

    namespace: str
    name: str

    def shape(self, mbit_per_s: float) -> None:
        """Shape this end, from anywhere on this machine. Raises RuntimeError if tc refuses.

        The burst is as small as possible, since after a pause, as between an all-reduce's phases,
        it is sent at full speed.
        """
        inside = ("ip", "netns", "exec", self.namespace)
        run(*inside, "tc", "qdisc", "replace", "dev", self.name, *shape(mbit_per_s, FRAME))


class Hosts(AbstractContextManager["Hosts"]):
    """`count` namespaces with one address each, at a bridge or a DelayingSwitch.

    The bridge has a namespace of its own; the switch is used if frames should arrive `delay_ms`
    later. `between` are both ends of every host's link (with a delay, only its own). With
    `hosts_per_node` and no delay, that many hosts are at a bridge of their node, and these at one
    between nodes: then `inside` are the ends of the hosts' links, and `between` those of a node's
    one link.
    """

    def __init__(self, count: int, delay_ms: float = 0.0, hosts_per_node: int = 0) -> None:
        self.mark, self.delay_ms, self.hosts_per_node = (
            f"scaling-{os.getpid()}",
            delay_ms,
            hosts_per_node,
        )
        self.hub, self.names = f"{self.mark}-hub", [f"{self.mark}-{i}" for i in range(count)]
        links = [Interface(name, INTERFACE) for name in self.names]
        if not delay_ms:
            links += [Interface(self.hub, f"port{number}") for number in range(count)]
        self.nodes = range(count // hosts_per_node if hosts_per_node else 0)
        trunks = [Interface(self.hub, f"{end}{node}") for node in self.nodes for end in TRUNK]
        self.inside, self.between = (links, trunks) if hosts_per_node else ([], links)
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
                run("ip", "netns", "exec", name, "sysctl", "-qw", *TCP)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _add_bridge(self) -> None:
        hub = ("ip", "-n", self.hub)
        for bridge in ("bridge", *(f"node{node}" for node in self.nodes)):
            run(*hub, "link", "add", bridge, "type", "bridge")
            run(*hub, "link", "set", bridge, "up")
        for node in self.nodes:
            up, down = (f"{end}{node}" for end in TRUNK)
            run(*hub, "link", "add", up, "mtu", MTU, "type", "veth", "peer", down, "mtu", MTU)
            run(*hub, "link", "set", up, "master", f"node{node}", "up")
            run(*hub, "link", "set", down, "master", "bridge", "up")
        for number, name in enumerate(self.names):
            port, bridge = (
                f"port{number}",
                f"node{number // self.hosts_per_node}" if self.nodes else "bridge",
            )
            peer = ("peer", "name", port, "mtu", MTU, "netns", self.hub)
            run("ip", "link", "add", INTERFACE, "netns", name, "type", "veth", *peer)
            run(*hub, "link", "set", port, "master", bridge, "up")

    def _add_switch(self) -> None:
        taps = [f"tap{os.getpid()}-{number}" for number in range(len(self.names))]
        self.switch = DelayingSwitch(taps, self.delay_ms / 1000)
        for tap, name in zip(taps, self.names, strict=True):
            run("ip", "link", "set", tap, "netns", name, "name", INTERFACE)
        self.switch.start()

    def address(self, number: int) -> str:
        """Return the IPv4 address of a host."""
        return f"{NETWORK}.{number + 1}"

    def start(
        self, number: int, command: Sequence[str], environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host."""
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
