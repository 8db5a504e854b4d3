"""Choose a loader by name and open it."""

from __future__ import annotations

import os
from typing import Literal

from harness.config.schema import Config
from harness.data.batch import Loader
from harness.data.batch_plan import BatchPlan
from harness.errors import UserError
from harness.slurm_step import cpus_of_task


def resolve_loader(name: str, rank: int) -> str:
    """Return `run.loader` with "auto" replaced: "dali" where it can be imported, else "reference".

    Rank 0 prints what is missing. Raises UserError where "dali" was requested by name.
    """
    if name not in ("auto", "dali") or not (missing := _missing_dali()):
        return "dali" if name == "auto" else name
    if name == "dali":
        raise UserError(f"run.loader: {missing}; or set run.loader=auto")
    if rank == 0:
        print(f"run.loader: {missing}; using the reference loader", flush=True)
    return "reference"


def _missing_dali() -> str:
    """Return why DALI cannot be used and what to do; empty where it can."""
    try:
        import harness.data.loaders.dali  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: one of its libraries does not load
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("nvidia")
        why = "is not installed" if absent else f"cannot be imported ({str(error).splitlines()[0]})"
        return f"DALI {why}: pip install -e '.[dali]' (CUDA 12: '.[dali-cuda12]')"
    return ""


def resolve_threads(threads: int | Literal["auto"], local_ranks: int) -> int:
    """Return `run.loader_threads`; "auto" shares the cores of this machine among its ranks.

    Tasks of srun with --cpus-per-task use as many, as each of them is bound to its own.
    """
    if threads != "auto":
        return threads
    return cpus_of_task() or max(len(os.sched_getaffinity(0)) // local_ranks, 1)


def open_loader(
    config: Config, batch_plan: BatchPlan, name: str, threads: int, device_is_cuda: bool
) -> Loader:
    """Open the loader `name` ("dali", "reference" or "memory"); close it after use.

    `threads`: worker processes of "reference" (0 loads in this process), threads of "dali".
    """
    from harness.data.loaders.memory import MemoryLoader
    from harness.data.loaders.reference import ReferenceLoader

    if name == "memory":
        return MemoryLoader(config, batch_plan, device_is_cuda)
    if name == "dali":
        from harness.data.loaders.dali import DaliLoader

        return DaliLoader(config, batch_plan, threads, device_is_cuda)
    return ReferenceLoader(config, batch_plan, threads, device_is_cuda)
