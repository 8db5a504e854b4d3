"""The host's memory: what a step has freed is kept for the next one."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE = 2**31 - 1  # bytes: malloc takes an int
OLDER_LIMIT = 2**25  # bytes: the most that glibc before 2.35 takes for M_MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """From now on, this process' malloc keeps freed memory instead of handing it back.

    glibc hands large blocks back to the system, activations for one, and each step then waits for
    their pages anew: 10,000 in the quickstart's, a fifth of its time on a CPU. Peak memory is 1
    to 4 % above a bare loop's (benchmarks/memory.py). Does nothing with another C library.
    """
    if os.name != "posix" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    libc.mallopt(M_TRIM_THRESHOLD, LARGE)
    if not libc.mallopt(M_MMAP_THRESHOLD, LARGE):
        libc.mallopt(M_MMAP_THRESHOLD, OLDER_LIMIT)
