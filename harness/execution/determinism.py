"""The settings of PyTorch under which a pass gives the same bits whenever it is repeated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from harness.config.run_section import RunConfig
from harness.runs.exact_conditions import intra_op_threads

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS is deterministic with workspaces of fixed sizes only


@contextmanager
def threads_and_determinism(run: RunConfig, device: torch.device) -> Iterator[None]:
    """Within, operations use `run.intra_op_threads`; exact sums allow only deterministic ones.

    An operation without a deterministic implementation then raises RuntimeError. What was set
    before is restored.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(intra_op_threads(run, device))
    try:
        if run.sums == "exact":
            with _deterministic():
                yield
        else:
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _deterministic() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    memory: Any = torch.utils.deterministic  # its one attribute is not declared
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    chosen = cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory
    workspace = os.environ.get(WORKSPACE)
    os.environ.setdefault(WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    memory.fill_uninitialized_memory = False  # nothing here reads memory that it has not written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = chosen
        if workspace is None:
            del os.environ[WORKSPACE]
