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
    """Within, children are forked: stop signals wait until each child has settled.

    Garbage goes before, here: a child that collected a former run's DDP would wait for, or crash
    on, the threads of its process group, as a fork has none of them.
    """
    gc.collect()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def settle_child(parent: int, ignored: Iterable[signal.Signals] = TERMINAL_SIGNALS) -> None:
    """Called first in a child: it dies with the process `parent`, and `ignored` do not reach it.

    The terminal and SLURM signal whole process groups, but it is the parent that decides how to
    stop; a child that died of the signal would take the parent's checkpoint with it.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)  # not the parent's handlers
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be asked
        os._exit(1)


@contextmanager
def worker_processes(count: int) -> Iterator[Executor]:
    """`count` processes that work for this one, and end with it however it ends.

    On leaving, work that was not begun is dropped. Raises UserError where one is killed.
    """
    executor = ProcessPoolExecutor(count, get_context("fork"), settle_child, (os.getpid(),))
    try:
        with starting_children():
            executor.submit(os.getpid)  # starts all of them
        yield executor
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for want of memory; give the machine more"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)
