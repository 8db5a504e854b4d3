"""A throwaway SLURM on this machine: four nodes, two null devices a node for GPUs, no database.

    python -m tests.cluster.throwaway start [--namespaces]    stop

Daemons of the real SLURM, run as root, in a folder of their own (/tmp/throwaway-slurm): slurmctld,
a munged with its own key and socket, and a slurmd for each node. The nodes share the machine's
network (n1 to n4 are names of 127.0.0.1), or, with namespaces, each has a network and a host name
of its own (c1 to c4), so that one can be cut off. FOLDER/unshared is read-only for the nodes.

Several clusters may run side by side, but one with namespaces only. A cluster that a process owns
is stale when that process has gone without stopping it: the next start() removes it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from harness.atomic_file import write_atomically

NODES = 4
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "ip", "nsenter")
HOSTS = Path("/etc/hosts")
HIDDEN = "/usr/sbin:/sbin"  # where Debian keeps the daemons, not on every user's PATH
MARK = "THROWAWAY_SLURM"  # in the environment of the daemons
HOSTS_LINE = "{address} {node} # throwaway SLURM in {folder}\n"
HOSTS_PATTERN = re.compile(r"\S+ ([cn])\d+ # throwaway SLURM in (.*)")
BRIDGE, NETWORK = "throwaway0", "10.77.0"
CONF = """\
ClusterName=throwaway
SlurmctldHost={host}
SlurmctldPort={port}
FirstJobId={first_job_id}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={requeue_delay_s}
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=1
SlurmdTimeout={silence_s}
MaxJobCount=100
MinJobAge=3600
KillWait=20
MailProg=/bin/true
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=8 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE
PartitionName=low Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""
REQUEUE_DELAY_S = 5  # SLURM's lifetime of a job credential; 120 unless set
# after so long a silence a node is down: soon where a test waits for it, else not on a busy machine
SILENCE_S, LONG_SILENCE_S = 10, 120


def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    lost = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    if lost:
        return f"no {', '.join(lost)}: apt-get install slurm-wlm munge iproute2"
    return "" if os.geteuid() == 0 else "the throwaway SLURM's daemons need root"


def search_path() -> str:
    return f"{os.environ.get('PATH', '')}:{HIDDEN}"


def run(*command: object, timeout_s: float = 30) -> str:
    """The output of a command; raises with what it said where it fails or hangs."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=os.environ | {"PATH": search_path()},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def wait_for(what: str, done: Callable[[], object], timeout_s: float) -> None:
    """Polls until `done()` is true. Raises TimeoutError."""
    end_s = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > end_s:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.1)


class ThrowawayCluster:
    """`nodes`: their names; `conf`: what SLURM_CONF must be for commands to reach it.

    `owned`: this process will stop it, or, if it cannot, whoever starts the next one.
    """

    def __init__(self, folder: Path, namespaces: bool = False, owned: bool = False) -> None:
        self.folder, self.namespaces, self.owned = folder.resolve(), namespaces, owned
        self._lock = self.folder / "owned"  # locked by the owner; its end, of any kind, unlocks it
        self.conf = self.folder / "slurm.conf"
        self.nodes = [f"{'c' if namespaces else 'n'}{i}" for i in range(1, NODES + 1)]

    def command(self, *words: object, timeout_s: float = 30) -> str:
        """Runs a SLURM command on this cluster, such as ("scontrol", "show", "nodes")."""
        names = (f"SLURM_CONF={self.conf}", f"{MARK}={self.folder}")
        return run("env", *names, *words, timeout_s=timeout_s)

    def start(self) -> None:
        """Raises where a daemon does not come up; what had come up is stopped again."""
        for other in known_clusters():
            if other.is_stale():
                other.stop()
            elif other.namespaces and self.namespaces:
                raise RuntimeError(f"{other.folder}: has namespaces too; stop that cluster first")
        try:
            self.folder.mkdir(parents=True)
            if self.owned:
                self._owner = self._lock.open("w")
                fcntl.flock(self._owner, fcntl.LOCK_EX)
            self._add_hosts()
            self._write_files()
            self._start_munge()
            if self.namespaces:
                self._add_network()
            self.command("slurmctld")
            for node in self.nodes:
                self.start_node(node)
            wait_for("idle nodes", lambda: self._idle() == NODES, 30)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends every process of this cluster by its pid, jobs included; removes what was added."""
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for("the daemons' end", lambda: not list(self._pids()), 20)
        if self.namespaces:
            self._remove_network()
        with _hosts() as lines:
            lines[:] = [line for line in lines if not line.endswith(f" in {self.folder}\n")]
        shutil.rmtree(self.folder, ignore_errors=True)

    def is_stale(self) -> bool:
        """Whether its owner has gone, or, after a reboot, all of it."""
        try:
            with self._lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
        except BlockingIOError:
            return False
        except FileNotFoundError:
            return not self.folder.exists()

    def start_node(self, node: str) -> None:
        """A slurmd in a mount namespace where FOLDER/unshared is another, read-only folder."""
        readonly = f"mount -t tmpfs -o ro none {self.folder}/unshared"
        inside, spaces = f"{readonly}; exec slurmd -N {node}", ["unshare", "--mount"]
        if self.namespaces:
            inside = f"hostname {node}; mount --bind {self._hosts_of(node)} {HOSTS}; {inside}"
            spaces = ["nsenter", f"--net=/run/netns/{node}", *spaces, "--uts"]
        self.command(*spaces, "sh", "-c", inside)

    def configure(self, **values: str) -> None:
        """Sets keys of slurm.conf while the cluster runs."""
        lines = [line for line in _lines(self.conf) if line.partition("=")[0] not in values]
        text = "".join(f"{k}={v}\n" for k, v in values.items() if v) + "".join(lines)
        # a slurmd may still read it for the last call, and ends where it reads half a file
        write_atomically(self.conf, text.encode())
        self.command("scontrol", "reconfigure")

    def cut_off(self, node: str) -> None:
        """Takes the node's network link down; its processes go on (namespaces only)."""
        run("ip", "link", "set", f"{BRIDGE}-{node}", "down")

    def connect(self, node: str) -> None:
        run("ip", "link", "set", f"{BRIDGE}-{node}", "up")

    def _idle(self) -> int:
        return sum(
            map(int, self.command("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").split())
        )

    def _write_files(self) -> None:
        for name in (
            "state",
            "log",
            "munge",
            "unshared",
            *(f"spool/{node}" for node in self.nodes),
        ):
            (self.folder / name).mkdir(parents=True)
        for gpu in range(2):
            run("mknod", self.folder / f"gpu{gpu}", "c", 1, 3)  # as /dev/null
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        port = _free_ports(NODES + 1)
        host = f"{socket.gethostname()}({NETWORK}.254)" if self.namespaces else "localhost"
        values = {"folder": self.folder, "requeue_delay_s": REQUEUE_DELAY_S}
        values["silence_s"] = SILENCE_S if self.namespaces else LONG_SILENCE_S
        # the port of a job's rendezvous comes from its id: clusters side by side need different ids
        values["first_job_id"] = random.SystemRandom().randrange(1, 12000) if self.owned else 1
        nodes = "\n".join(self._node_line(i, port + i) for i in range(1, NODES + 1))
        self.conf.write_text(CONF.format(host=host, port=port, nodes=nodes, **values))

    def _node_line(self, number: int, port: int) -> str:
        node = self.nodes[number - 1]
        if self.namespaces:
            return f"NodeName={node} NodeAddr={NETWORK}.{number} Port={port}"
        return f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port}"

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        options = [f"--key-file={key}", f"--socket={folder}/socket", f"--pid-file={folder}/pid"]
        options += [f"--log-file={folder}/log", f"--seed-file={folder}/seed", "--force"]
        self.command("munged", *options)

    def _add_hosts(self) -> None:
        """MASTER_ADDR is a node's name, so names must be known; they also tell of this cluster."""
        with _hosts() as lines:
            for i, node in enumerate(self.nodes, 1):
                address = f"{NETWORK}.{i}" if self.namespaces else "127.0.0.1"
                lines.append(HOSTS_LINE.format(address=address, node=node, folder=self.folder))

    def _hosts_of(self, node: str) -> Path:
        """The node's own /etc/hosts: as Debian writes it, its name is the machine itself."""
        path = self.folder / f"hosts.{node}"
        lines = [f"{NETWORK}.{i} {other}" for i, other in enumerate(self.nodes, 1) if other != node]
        path.write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {node}", *lines, ""]))
        return path

    def _add_network(self) -> None:
        """A bridge, and for each node a network namespace with one end of a cable (eth0)."""
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "addr", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        for number, node in enumerate(self.nodes, 1):
            cable = f"{BRIDGE}-{node}"
            run("ip", "netns", "add", node)
            run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", node)
            run("ip", "link", "set", cable, "master", BRIDGE, "up")
            run("ip", "-n", node, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                run("ip", "-n", node, "link", "set", device, "up")

    def _remove_network(self) -> None:
        for words in [("link", "del", BRIDGE), *(("netns", "del", node) for node in self.nodes)]:
            with contextlib.suppress(RuntimeError):  # it had not come up
                run("ip", *words)

    def _pids(self) -> Iterator[int]:
        """The daemons carry the mark in their environment, what a job runs the cluster's
        SLURM_CONF and a job id."""
        daemon, conf = f"{MARK}={self.folder}".encode(), f"SLURM_CONF={self.conf}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                names = (process / "environ").read_bytes().split(b"\0")
                in_job = conf in names and any(name.startswith(b"SLURM_JOB_ID=") for name in names)
                if daemon in names or in_job:
                    yield int(process.name)


def known_clusters() -> list[ThrowawayCluster]:
    """Those that were started and not stopped, by their lines in /etc/hosts."""
    found = {match.groups() for match in map(HOSTS_PATTERN.match, _lines(HOSTS)) if match}
    return [ThrowawayCluster(Path(folder), namespaces=letter == "c") for letter, folder in found]


@contextlib.contextmanager
def _hosts() -> Iterator[list[str]]:
    """The lines of /etc/hosts, to be changed in place; one process at a time."""
    with HOSTS.open("r+") as file:  # not replaced: in a container it is a mount
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = file.readlines()
        yield lines
        file.seek(0)
        file.writelines(lines)
        file.truncate()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def _free_ports(count: int) -> int:
    """The first of so many neighbouring ports that are free now."""
    while True:
        first = random.SystemRandom().randrange(17000, 19900)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("0.0.0.0", port))
            return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("--namespaces", action="store_true", help="a network for each node")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/throwaway-slurm"))
    options = parser.parse_args()
    if reason := missing():
        sys.exit(f"error: {reason}")
    cluster = ThrowawayCluster(options.folder, options.namespaces)
    if options.action == "stop":
        known = [other for other in known_clusters() if other.folder == cluster.folder]
        return (known or [cluster])[0].stop()
    if options.folder.exists():
        sys.exit(f"error: {options.folder}: exists; stop that cluster first: make cluster-stop")
    try:
        cluster.start()
    except (RuntimeError, TimeoutError) as error:
        sys.exit(f"error: {error}")
    print(f"export SLURM_CONF={cluster.conf}   # then: sinfo")


if __name__ == "__main__":
    main()
