"""The conditions that the bits of exact sums depend on, besides config, code and data."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config.run_section import RunConfig
from harness.runs.logging.jsonl import Record

if TYPE_CHECKING:
    import torch

CPU_INFO = Path("/proc/cpuinfo")


def intra_op_threads(run: RunConfig, device: torch.device) -> int:
    """Return the threads that an operation on the CPU uses, by `run.intra_op_threads`.

    `auto` is 1 where sums are exact and computed on a CPU, as each number of threads has bits of
    its own; else it is what PyTorch has chosen.
    """
    import torch

    if run.intra_op_threads != "auto":
        return run.intra_op_threads
    return 1 if run.sums == "exact" and device.type == "cpu" else torch.get_num_threads()


def exact_conditions(run: RunConfig, device: torch.device) -> Record:
    """Return, by their names for people, the conditions under which a rank computes these bits.

    Ranks must agree in them, and a resume under others continues with other bits. Empty unless
    sums are exact.
    """
    import torch

    if run.sums != "exact":
        return {}
    if device.type == "cuda":
        return {
            "GPU": torch.cuda.get_device_name(device),
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
            "workers of a unit": run.unit_workers,
        }
    return {
        "CPU": cpu_model(),
        "CPU instructions": torch.backends.cpu.get_cpu_capability(),
        "threads of an operation": intra_op_threads(run, device),
        "workers of a unit": run.unit_workers,
    }


def cpu_model() -> str:
    """Return the model of this machine's CPU: its libraries choose kernels by it."""
    found = re.search(r"model name\s*:\s*(.+)", CPU_INFO.read_text()) if CPU_INFO.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
