"""Running statistics of batch norm over all workers of a minibatch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from harness.distributed import sum_over_ranks
from harness.models.ghost_batch_norm import ghost_batch_norms


@contextmanager
def global_running_statistics(model: nn.Module, share: float | None) -> Iterator[None]:
    """Within: running statistics are the means over all k workers. After: the rank's own again.

    `share` is (workers of this rank) / k; None: the rank's own are already those of all workers.
    The moving average is linear, so the weighted sum of the ranks' averages is the average of the
    workers' statistics. The rank's own are restored, so evaluating or saving never changes the run.
    """
    layers = ghost_batch_norms(model)
    if share is None or not dist.is_initialized() or not layers:
        yield
        return
    buffers = [
        b for layer in layers for b in (layer.running_mean, layer.running_var) if b is not None
    ]
    own = [buffer.clone() for buffer in buffers]
    flat = torch.cat([buffer.double() for buffer in buffers]) * share
    sum_over_ranks(flat)
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean)
    try:
        yield
    finally:
        for buffer, kept in zip(buffers, own, strict=True):
            buffer.copy_(kept)
