"""A SLURM job step, by the variables of a task: the node's tasks and the rendezvous."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping

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
