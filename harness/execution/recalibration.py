"""Precise statistics: batch norm's running statistics from training images, for an evaluation.

The moving averages of training lag behind the weights, by about ten steps: much in early epochs and
at a large learning rate. Wu and Johnson 2021 (arXiv 2105.07576), section 3, call statistics that
are computed with fixed weights precise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from harness.compat import zero_all
from harness.config.schema import Config
from harness.data.batch import Batch
from harness.distributed import sum_over_ranks
from harness.exact_sum import from_fixed_point, to_fixed_point
from harness.execution.compilation import uncompiled
from harness.execution.precision import autocast
from harness.execution.preprocess import Preprocess
from harness.models.ghost_batch_norm import ghost_batch_norms
from harness.models.running_statistics import global_running_statistics, statistics_within


def evaluation_statistics(
    config: Config,
    model: nn.Module,
    share: float | None,
    training_images: Callable[[], Iterable[Batch]],
    preprocess: Preprocess,
) -> AbstractContextManager[None]:
    """Return the context of an evaluation. Within: the running statistics of `config`. After: own.

    They are the moving averages over all workers, of which this rank has `share`, or, with
    `run.recalibrate_images`, the means over `training_images`, the batches of `Loader.recalibrate`.
    """
    if config.run.recalibrate_images == 0:
        return global_running_statistics(model, share)
    return recalibrated_statistics(config, model, training_images(), preprocess)


@contextmanager
def recalibrated_statistics(
    config: Config, model: nn.Module, batches: Iterable[Batch], preprocess: Preprocess
) -> Iterator[None]:
    """Within: running statistics are the means over all ranks' `batches`. After: own again.

    Of each worker's n images the mean and the unbiased variance count, as in training, so neither
    the ranks nor the micro-batches play a part, and the sums are exact. Synchronises device and
    ranks.
    """
    if not ghost_batch_norms(model):
        yield
        return
    sums = sum_over_ranks(_sum_statistics(config, model, batches, preprocess))
    workers = config.run.recalibrate_images // config.recipe.worker_batch
    with statistics_within(ghost_batch_norms(model), from_fixed_point(sums) / workers):
        yield


@torch.no_grad()
def _sum_statistics(
    config: Config, model: nn.Module, batches: Iterable[Batch], preprocess: Preprocess
) -> Tensor:
    """Return the sums over this rank's workers of mean and variance of each layer, as integers."""
    layers, was_training = ghost_batch_norms(model), model.training
    sums = to_fixed_point(torch.cat([layer.sums.view(-1) for layer in layers])).zero_()
    model.train()
    for batch in batches:
        with uncompiled(config), autocast(config, preprocess.device):
            model(preprocess(batch.images))
        sums += to_fixed_point(torch.cat([layer.sums.view(-1) for layer in layers]))
        zero_all([scratch for layer in layers for scratch in (layer.sums, layer.one_worker)])
    model.train(was_training)
    return sums
