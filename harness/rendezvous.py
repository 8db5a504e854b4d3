"""The rendezvous of a launch's ranks: a store that torchrun's agent, or rank 0, keeps."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass

import torch.distributed as dist

from harness.compat import is_port_in_use
from harness.distributed import World, group_timeout
from harness.errors import UserError
from harness.outcome import RunFailed
from harness.slurm_step import ended_local_tasks, step_id, use_slurm_rendezvous

PAUSE_S = 0.02  # between two reads of the store
NAME_PATIENCE_S = 5.0  # for name servers that fail for a moment
LOOK_EVERY_S = 1.0  # whether the other tasks of the job step are alive
OPENING = "harness/opening"  # its key
PROCESS = uuid.uuid4().hex  # distinguishes this process from any other


@dataclass(frozen=True)
class Opening:
    """Identifies the launch of a rendezvous; rank 0 writes it for the other ranks."""

    launch: str
    generation: str
    world_size: int
    host: str  # rank 0's
    process: str  # distinguishes rank 0's process from any other


def launch_of(world: World, environment: Mapping[str, str] = os.environ) -> str:
    """Return the name that all ranks of a launch share and other launches do not.

    Launches by hand have no such name, so all of them count as one.
    """
    run_id = environment.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's own default is "none"
    if run_id != "none":
        return f"torchrun --rdzv-id {run_id}"
    if world.launcher == "slurm":
        return f"SLURM job step {step_id(environment)}"
    return "a launch without an id"


def generation(world: World) -> str:
    """Return a name for these ranks in a store that outlives them.

    torchrun's agent may keep its store when it restarts the ranks; without a name of their own
    they would find the addresses of dead processes. A restart raises the count, a node that joins
    or leaves changes the world size, and a process may meet the other ranks several times.

    In a new store, which rank 0 keeps, the count must not be part of the name: an agent counts
    only failures of its own ranks, so after one the nodes have different counts and would never
    meet. Nor must the world size, so that ranks which disagree on it can find that out.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = f"{restarts}-{world.world_size}-" if _agent_keeps_store() else ""
    return f"generation-{own}{_meetings}"


_meetings = 0


def _agent_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def patience(timeout_s: float) -> Callable[[], None]:
    """Return a function that waits a moment, and raises RunFailed where there is no hope left.

    That is once `timeout_s` have passed, or once other tasks of the job step have ended.
    """
    began_s, looked_s, ended = time.monotonic(), 0.0, 0

    def pause() -> None:
        nonlocal looked_s, ended
        time.sleep(PAUSE_S)
        now_s = time.monotonic()
        if now_s - began_s > timeout_s:
            why = f"for {timeout_s:g} s (run.hang_timeout_s)"
            raise RunFailed(f"not all ranks joined at {_place()} {why}")
        if now_s - looked_s > LOOK_EVERY_S:
            looked_s = now_s
            before, ended = ended, ended_local_tasks()
            if before and ended:  # twice, as a task's last words take a moment to be read
                raise RunFailed(
                    f"{ended} of this job step's tasks on {socket.gethostname()} cannot join, as "
                    "they have ended; in a shell put `srun --overlap` before the same command"
                )

    return pause


def rendezvous(
    world: World, hang_timeout_s: float, pause: Callable[[], object] | None = None
) -> dist.Store | None:
    """Return the store at which the ranks meet, in torchrun's agent or rank 0; None for one rank.

    Each call is a new meeting. `pause` is called between two reads of the store, and may raise to
    end the wait. Raises UserError where no rendezvous is named, its port is in use, or it belongs
    to another launch, and RunFailed where it cannot be reached within the time-out.
    """
    global _meetings
    if world.world_size == 1:
        return None
    if world.launcher == "slurm":
        use_slurm_rendezvous()
    _meetings += 1
    keeps_store = world.rank == 0 and not _agent_keeps_store()
    wait = pause or patience(hang_timeout_s)
    while True:
        try:
            store = _open_store(keeps_store, hang_timeout_s, wait)
            _announce(store, world) if world.rank == 0 else _wait_for_opening(store, world, wait)
            return dist.PrefixStore(generation(world), store)
        except dist.DistNetworkError as error:
            if is_port_in_use(error):
                raise UserError(f"rendezvous: port {_place()} is in use; choose another") from error
            # this was the store of the last meeting, which rank 0 has just closed
            wait()


def _opening(store: dist.Store) -> Opening | None:
    """Return the identity of the rendezvous; None before rank 0 has written it."""
    return Opening(**json.loads(store.get(OPENING))) if store.check([OPENING]) else None


def _address() -> tuple[str, int]:
    try:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"rendezvous: {error}: missing or no number; launch with torchrun or srun"
        ) from None


def _place() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _open_store(
    keeps_store: bool, hang_timeout_s: float, wait: Callable[[], object]
) -> dist.TCPStore:
    """Connect to the store, which this process keeps itself if `keeps_store`.

    PyTorch's constructor blocks without running signal handlers, forever where another program
    answers at the port, and prints pages where nobody answers. So it is called in a thread, once
    somebody answers.
    """
    address, port = _address()
    _check_name(address)
    while not keeps_store and not _answers(address, port):
        wait()
    opened: Future[dist.TCPStore] = Future()

    def open_it() -> None:
        try:
            store = dist.TCPStore(
                address,
                port,
                is_master=keeps_store,
                timeout=group_timeout(hang_timeout_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except BaseException as error:
            opened.set_exception(error)
        else:
            opened.set_result(store)

    threading.Thread(target=open_it, name="rendezvous", daemon=True).start()
    while not opened.done():
        wait()
    return opened.result()


def _check_name(address: str) -> None:
    """Raise UserError where this machine cannot find MASTER_ADDR, even after some seconds."""
    end_s = time.monotonic() + NAME_PATIENCE_S
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as error:
            if time.monotonic() > end_s:
                raise UserError(
                    f"rendezvous: {socket.gethostname()} knows no address of {address} "
                    f"({error.strerror}): set MASTER_ADDR to an address of that node"
                ) from None
        time.sleep(1.0)


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _announce(store: dist.Store, world: World) -> None:
    """Open the rendezvous, on rank 0. Raises UserError where another process has opened it."""
    host = socket.gethostname()
    own = Opening(launch_of(world), generation(world), world.world_size, host, PROCESS)
    text = json.dumps(asdict(own))
    if not _agent_keeps_store():
        # MASTER_ADDR may be another machine, on which another launch uses the same port
        found = Opening(**json.loads(store.compare_set(OPENING, "", text)))
        if found.process != own.process:
            raise UserError(
                f"rendezvous: {_place()} is taken by {found.launch}, rank 0 "
                f"on {found.host}, this one is {own.launch}, rank 0 on {host}; unset MASTER_ADDR "
                "and MASTER_PORT, or choose another port"
            )
    store.set(OPENING, text)  # replaces that of the previous meeting


def _wait_for_opening(store: dist.Store, world: World, wait: Callable[[], object]) -> None:
    """Wait until rank 0 has opened this meeting. Raises UserError where it is another launch's."""
    own, host = launch_of(world), socket.gethostname()
    while True:
        found = _opening(store)
        if found is not None and found.launch != own:
            raise UserError(
                f"rendezvous: {_place()} is that of {found.launch}, rank 0 on {found.host}; rank "
                f"{world.rank} on {host} is of {own} and cannot join; unset MASTER_ADDR and "
                "MASTER_PORT, or choose another port"
            )
        if found is not None and found.generation == generation(world):
            break
        wait()
    if world.rank >= found.world_size:
        raise UserError(
            f"rendezvous: rank {world.rank} on {host} cannot join at {_place()}: rank 0 on "
            f"{found.host} has WORLD_SIZE={found.world_size}; start all ranks with the same"
        )
