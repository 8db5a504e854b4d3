"""malloc's settings: memory that a step has freed is kept for the next one."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE = 2**31 - 1  # bytes: malloc takes an int
OLDER_LIMIT = 2**25  # bytes: glibc before 2.35 takes no more for M_MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """Have this process's malloc keep freed memory instead of returning it to the system.

    glibc returns large blocks, such as activations, and each step then waits for new pages: 10,000
    in a step of the quickstart, a fifth of its time on a CPU. Peak memory is 1 to 4 % above a bare
    loop's (benchmarks/memory.py). The setting cannot be undone, so only a command calls this,
    never the library. Does nothing with another C library.
    """
    if os.name != "posix" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    libc.mallopt(M_TRIM_THRESHOLD, LARGE)
    if not libc.mallopt(M_MMAP_THRESHOLD, LARGE):
        libc.mallopt(M_MMAP_THRESHOLD, OLDER_LIMIT)
