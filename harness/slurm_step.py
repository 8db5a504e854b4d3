"""A SLURM job step, by the variables of a task: the node's tasks and the rendezvous."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from harness.errors import UserError

FIRST_PORT, PORTS = 20000, 20000
STEPS_APART = 7919  # ports: a prime, so steps of jobs that run side by side do not coincide


def local_tasks(environment: Mapping[str, str]) -> int:
    """Return the number of this step's tasks on this node."""
    counts: list[int] = []
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as "4(x2),3"
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(count)] * int(repeated or 1)
    return counts[int(environment.get("SLURM_NODEID", "0"))]


def cpus_of_task(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the CPUs of this task of srun; None where srun was not asked for a number."""
    if "RANK" in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return None
    text = environment.get("SLURM_CPUS_PER_TASK", "")
    return int(text) if text.isdecimal() else None


def check_not_in_step_shell(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError in the terminal of `srun --pty`, whose step has no other task to join.

    srun gives the terminal to task 0; the shells of the other tasks end immediately.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    by_torchrun = "RANK" in environment
    # a step started from that shell inherits the variable, but has no terminal
    if tasks > 1 and "SLURM_PTY_PORT" in environment and sys.stdin.isatty() and not by_torchrun:
        raise UserError(
            f"{tasks - 1} of the {tasks} tasks of this job step are missing, as a terminal is one "
            "task: to start all of them put `srun --overlap` before the same command"
        )


def unused_tasks(environment: Mapping[str, str] = os.environ) -> str:
    """Return a hint where this process is the only rank of a job of several tasks, else ""."""
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks == "1" or "SLURM_STEP_NUM_TASKS" in environment or "RANK" in environment:
        return ""
    return f"1 rank in a job of {tasks} tasks; to use all of them put `srun` before the command"


def ended_local_tasks(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many of this step's tasks on this node have ended; 0 where that is unknown."""
    if "SLURM_STEP_NUM_TASKS" not in environment or not _sees_slurmstepd():
        return 0  # no step, or a container in which the other tasks are invisible
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID")
    step = {f"{name}={environment[name]}" for name in names if name in environment}
    alive = set()
    for process in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            theirs = set(process.read_bytes().decode(errors="replace").split("\0"))
            if step <= theirs:
                alive |= {text for text in theirs if text.startswith("SLURM_PROCID=")}
    return max(local_tasks(environment) - len(alive), 0)


def _sees_slurmstepd() -> bool:
    return "slurmstepd" in _ancestors()


def _ancestors() -> Iterator[str]:
    """Yield the names of this process's ancestors, as far as they are visible."""
    process = os.getpid()
    with contextlib.suppress(OSError, KeyError):
        while process > 1:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
            status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            yield status["Name"].split()[0]
            process = int(status["PPid"])


def step_id(environment: Mapping[str, str]) -> str:
    """Return job.step and the number of requeues, which excludes tasks of an earlier start."""
    job, step = environment.get("SLURM_JOB_ID", "0"), environment.get("SLURM_STEP_ID", "0")
    requeues = environment.get("SLURM_RESTART_COUNT", "0")
    return f"{job}.{step}" + (f" after {requeues} requeues" if requeues != "0" else "")


def rendezvous_port(environment: Mapping[str, str]) -> int:
    """Return a port for this step; several steps of a job may run side by side."""
    job = int(environment.get("SLURM_JOB_ID", "0"))
    step = int(environment.get("SLURM_STEP_ID", "0"))
    return FIRST_PORT + (job + STEPS_APART * step) % PORTS


def use_slurm_rendezvous(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set MASTER_ADDR and MASTER_PORT from the step, unless the launcher has set them."""
    first_host = _first_host(environment.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    environment.setdefault("MASTER_ADDR", first_host)
    environment.setdefault("MASTER_PORT", str(rendezvous_port(environment)))


def _first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list: n[01-04,7],m3 -> n01."""
    head = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodelist)
    if head is None:
        raise UserError(f"SLURM_STEP_NODELIST: {nodelist!r} names no host; set MASTER_ADDR")
    return head[1] + (head[2] or "") + (head[3] or "")
