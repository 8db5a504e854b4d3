"""Running statistics of batch norm over all workers of a minibatch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.distributed import sum_over_ranks
from harness.models.ghost_batch_norm import GhostBatchNorm2d, ghost_batch_norms


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
    flat = torch.cat([buffer.double() for buffer in _buffers(layers)]) * share
    with statistics_within(layers, sum_over_ranks(flat)):
        yield


@contextmanager
def statistics_within(layers: Sequence[GhostBatchNorm2d], flat: Tensor) -> Iterator[None]:
    """Within: the layers have the running statistics `flat`. After: their own again.

    `flat` holds mean and variance of each layer, one after the other.
    """
    buffers = _buffers(layers)
    own = [buffer.clone() for buffer in buffers]
    for buffer, values in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(values)
    try:
        yield
    finally:
        for buffer, kept in zip(buffers, own, strict=True):
            buffer.copy_(kept)


def _buffers(layers: Sequence[GhostBatchNorm2d]) -> list[Tensor]:
    return [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var)]
