"""Measures the norms of gradients that the noise scale (`recipe/noise_scale`) is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from harness.config.schema import Config
from harness.data.batch import Batch
from harness.exact_sum import exact_sum
from harness.execution.compilation import uncompiled
from harness.execution.precision import autocast
from harness.recipe.noise_scale import SquaredNorms
from harness.training.objective import Objective
from harness.training.replica import Replica


class NoiseProbe:
    """Every `run.noise_scale_every` steps, single workers' gradients beside the minibatch's.

    Each worker's n images go through the network once more, by themselves, before the update; the
    results are the same on any number of ranks, and weights and statistics those of a run without.
    """

    def __init__(self, config: Config, replica: Replica, objective: Objective) -> None:
        self._config, self._replica, self._objective = config, replica, objective
        self._parameters = [p for p in replica.network.parameters() if p.requires_grad]
        self._steps: list[int] = []
        self._minibatch: list[Tensor] = []  # of each step, a number
        self._workers: list[Tensor] = []  # of each of this rank's workers of each step, a number

    def is_due(self, step: int) -> bool:
        every = self._config.run.noise_scale_every
        return every > 0 and step % every == 0

    def measure(self, step: int, batches: Sequence[Batch]) -> None:
        """Measure a step whose gradients are summed; `batches` are its micro-batches.

        It must come between the update of the running statistics and that of the weights. Does not
        wait for the device.
        """
        scale = self._replica.loss_scale().double()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self._steps.append(step)
        self._minibatch.append(squared_norm(gradients) / scale**2)
        for batch in batches:
            self._workers += [self._of_worker(step, worker) for worker in self._by_worker(batch)]
        self._replica.running_statistics.forget()

    def _by_worker(self, batch: Batch) -> Iterator[Batch]:
        """Yield each worker's images of a micro-batch, which is in `Minibatch.places`' order."""
        n = self._config.recipe.worker_batch
        workers = len(batch.labels) // n
        for worker in range(workers):
            places = slice(worker, None, workers)
            if self._replica.device.type == "cuda":  # channels_last
                places = slice(worker * n, (worker + 1) * n)
            parts = batch.images[places], batch.labels[places], batch.ids[places]
            yield replace(batch, images=parts[0], labels=parts[1], ids=parts[2])

    def _of_worker(self, step: int, batch: Batch) -> Tensor:
        """Return the squared norm of the gradient of the mean loss over a worker's images."""
        replica, config = self._replica, self._config
        labels = batch.labels.to(replica.device, non_blocking=True)
        loss_of = self._objective(step, batch)
        with uncompiled(config), autocast(config, replica.device):
            logits = replica.network(replica.preprocess(batch.images))
        loss = replica.scaler.scale(loss_of(logits, labels).minimised)
        gradients = torch.autograd.grad(loss, self._parameters)
        # each image's loss is divided by kn: times k, it is the mean over n. Not before the
        # backward pass, in which float16 would overflow
        scale = replica.loss_scale().double() / config.workers
        return squared_norm(gradients) / scale**2

    def read(self) -> list[tuple[int, SquaredNorms]]:
        """Return (step, norms) of the steps since the last call. Synchronises device and ranks.

        Steps whose gradients overflowed in float16 are left out.
        """
        if not self._steps:
            return []
        local = torch.stack(self._workers).view(len(self._steps), -1)
        workers = (exact_sum(local) / self._config.workers).tolist()
        minibatch = torch.stack(self._minibatch).tolist()
        found = zip(self._steps, map(SquaredNorms, workers, minibatch), strict=True)
        finite = [pair for pair in found if isfinite(pair[1].worker + pair[1].minibatch)]
        self._steps, self._minibatch, self._workers = [], [], []
        return finite


def squared_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the squared norm of all gradients together, a float64 number on their device."""
    return torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()
