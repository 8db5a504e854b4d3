"""The reference loader: PIL in worker processes. It defines which pixels are right."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from harness.compat import kill_workers
from harness.config.schema import Config
from harness.data.batch import Batch
from harness.data.batch_plan import EVALUATION_BATCH, BatchPlan
from harness.data.loaders.child_process import STOP_SIGNALS, settle_child, starting_children
from harness.data.loaders.prefetch import Prefetcher
from harness.data.loaders.shared_memory import check_shared_memory
from harness.data.render import Renderer
from harness.data.sampling import BatchSpec
from harness.errors import UserError


class ReferenceLoader:
    """`threads` worker processes, each rendering a whole micro-batch at a time; 0: this process.

    The processes start here, before there is a CUDA context or a process group to inherit.
    Training and evaluation have their own, so that either continues where it stopped. Raises
    UserError where their batches do not fit into /dev/shm.
    """

    name = "reference"

    def __init__(
        self, config: Config, batch_plan: BatchPlan, threads: int, device_is_cuda: bool
    ) -> None:
        largest = batch_plan.micro_batch + min(EVALUATION_BATCH, len(batch_plan.val))
        check_shared_memory(largest * 3 * config.data.crop**2, threads)
        renderer = Renderer(config, batch_plan)
        self._batch_plan = batch_plan
        self._training = _Workers(renderer, threads, device_is_cuda)
        self._evaluation = _Workers(renderer, threads, device_is_cuda)

    def train(self, first_step: int) -> Iterator[Batch]:
        return self._training(self._batch_plan.training(first_step))

    def evaluate(self) -> Iterator[Batch]:
        return self._evaluation(self._batch_plan.evaluation())

    def recalibrate(self) -> Iterator[Batch]:
        return self._evaluation(self._batch_plan.recalibration())

    def close(self) -> None:
        for workers in (self._training, self._evaluation):
            workers.close()


class _Workers:
    """A DataLoader whose processes outlive its iterators."""

    def __init__(self, renderer: Renderer, threads: int, pin: bool) -> None:
        self._specs, self._pin = _Specs(), pin
        self._prefetcher: Prefetcher | None = None
        self._loader: DataLoader = DataLoader(
            _Rendered(renderer),
            batch_size=None,  # a spec is a whole batch
            sampler=self._specs,
            collate_fn=_unchanged,
            num_workers=threads,
            persistent_workers=threads > 0,
            worker_init_fn=partial(_settle_worker, os.getpid()),
            multiprocessing_context="fork" if threads else None,
            generator=torch.Generator(),  # leave the global one alone
        )
        with starting_children():
            next(iter(self._loader), None)  # there are no specs yet, but the processes start

    def __call__(self, specs: Iterator[BatchSpec]) -> Iterator[Batch]:
        """Return the batches of `specs`, in order; earlier iterators must not be used again."""
        self._end_prefetching()
        self._specs.follow(specs)
        batches = _received(iter(self._loader))
        if not self._pin:
            return batches
        self._prefetcher = Prefetcher(batches, pin=True)
        return self._prefetcher

    def close(self) -> None:
        self._end_prefetching()
        kill_workers(self._loader)

    def _end_prefetching(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None


class _Specs(Sampler):
    """The specs to render next, whichever iterator they come from."""

    def __init__(self) -> None:
        self._current: Iterator[BatchSpec] = iter(())

    def follow(self, specs: Iterator[BatchSpec]) -> None:
        """Take the next specs from `specs`."""
        self._current = specs

    def __iter__(self) -> Iterator[BatchSpec]:
        return self._current


class _Rendered(Dataset):
    """The batches of a renderer, by their specs."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    def __getitem__(self, spec: BatchSpec) -> Batch | UserError:
        try:
            return self._renderer(spec)
        except UserError as error:  # returned, because DataLoader adds a stack to what is raised
            return error


Answer = TypeVar("Answer")


def _received(answers: Iterator[Batch | UserError]) -> Iterator[Batch]:
    for answer in answers:
        if isinstance(answer, UserError):
            raise answer
        yield answer


def _unchanged(answer: Answer) -> Answer:
    return answer


def _settle_worker(parent: int, worker: int) -> None:
    settle_child(parent, STOP_SIGNALS)
