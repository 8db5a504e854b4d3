"""torch.compile of residual blocks: what is compiled, under which settings, and how far it is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from harness.compat import compiler_patch
from harness.config.schema import Config
from harness.recipe.initialization import residual_blocks

# each kind of residual block (8 in ResNet-50) at each size of micro-batch is compiled by itself
RECOMPILES = 64


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Have torch.compile compile each residual block at its first pass; the model stays in place.

    Blocks of one kind share their code, and gradients come block by block, so that DDP sends the
    first while others are made: a model compiled as one hands all over at the end. State dict and
    module names stay as they are. Passes belong within `compiler_settings`.
    """
    for _, block in residual_blocks(model):
        block.compile(dynamic=False, backend=backend)


def compiler_settings(compiled: bool) -> AbstractContextManager[object]:
    """The compiler's settings for a forward pass; they are process-wide, and restored after it.

    Every size of micro-batch is compiled. A block that cannot be compiled runs uncompiled, with a
    warning. Under DDP the compiler would cut the blocks at the bounds of gradient buckets, which
    is meant for models that are compiled as one.
    """
    return compiler_patch(RECOMPILES) if compiled else nullcontext()


def uncompiled(config: Config) -> AbstractContextManager[object]:
    """Within: blocks run as they are, as evaluation's batches are not worth compiling for."""
    compiled = config.run.compile is True
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
