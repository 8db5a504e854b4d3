"""torch.compile of residual blocks, and the settings for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from harness.compat import compiler_patch
from harness.config.schema import Config
from harness.models.registry import find_family

# Each kind of residual block (8 in ResNet-50) is compiled for each size of micro-batch.
RECOMPILES = 64


def compile_blocks(network: nn.Module, name: str, backend: str = "inductor") -> None:
    """Let torch.compile compile each residual block of the network `name` at its first pass.

    Blocks of one kind share their code, and gradients are ready block by block, so DDP sends the
    first while others are computed: a network compiled as a whole returns all of them at the end.
    A network whose family names no blocks is compiled as a whole nevertheless. State dict and
    module names do not change. Passes belong within `compiler_settings`.
    """
    blocks = find_family(name).residual_blocks(network)
    for module in [block.module for block in blocks] or [network]:
        module.compile(dynamic=False, backend=backend)


def compiler_settings(compiled: bool) -> AbstractContextManager[object]:
    """Within: the compiler's settings for a forward pass. They are process-wide, hence restored.

    Every size of micro-batch is compiled. A block that cannot be compiled runs uncompiled, with a
    warning. Under DDP the compiler would split the blocks at the bounds of gradient buckets, which
    is meant for networks that are compiled as a whole.
    """
    return compiler_patch(RECOMPILES) if compiled else nullcontext()


def uncompiled(config: Config) -> AbstractContextManager[object]:
    """Within: blocks run uncompiled, since compiling for an evaluation's batches does not pay."""
    compiled = config.run.compile is True
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
