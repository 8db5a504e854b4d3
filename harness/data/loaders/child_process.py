"""Child processes that end with their parent and leave signals to it."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

from harness.errors import UserError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP)  # Ctrl-C, a closed terminal
STOP_SIGNALS = (*TERMINAL_SIGNALS, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def starting_children() -> Iterator[None]:
    """Block stop signals while children are forked, until each of them has settled.

    Garbage is collected first, in the parent: a child that collected an earlier run's DDP would
    wait for, or crash on, the threads of its process group, none of which survive a fork.
    """
    gc.collect()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def settle_child(parent: int, ignored: Iterable[signal.Signals] = TERMINAL_SIGNALS) -> None:
    """Make this child die with the process `parent` and ignore the signals `ignored`.

    A child calls it first. The terminal and SLURM signal whole process groups, but the parent
    decides how to stop; a child that died of the signal would cost the parent its checkpoint.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)  # not the parent's handlers
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before prctl
        os._exit(1)


@contextmanager
def worker_processes(count: int) -> Iterator[Executor]:
    """Yield an executor of `count` processes, which end with this one however it ends.

    On exit, work that has not begun is dropped. Raises UserError where a process is killed.
    """
    executor = ProcessPoolExecutor(count, get_context("fork"), settle_child, (os.getpid(),))
    try:
        with starting_children():
            executor.submit(os.getpid)  # starts all of them
        yield executor
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps by a lack of memory; give the machine more"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)
