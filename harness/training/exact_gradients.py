"""The sum of gradients and of batch norm's statistics over a step, exact on any number of ranks.

Each unit of workers goes through the network by itself, so its float gradients are the same bits
wherever it runs. They are rounded to fixed point, and integers have the same sum in any order.
docs/one-curve.md argues range and resolution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.compat import copy_all, greatest_magnitudes
from harness.distributed import World
from harness.exact_sum import from_fixed_point, to_fixed_point
from harness.models.ghost_batch_norm import RunningStatistics
from harness.planning.step_time_model import BUCKET_BYTES, FIRST_BUCKET_BYTES
from harness.recipe.minibatch import Minibatch
from harness.resilience.step_observer import StepObserver

QUANTA, FINE_QUANTA = 2.0**50, 2.0**94  # in 1; the fine ones are for the second part of a float64
LARGEST_SUM = 2.0**62  # quanta of all units together: half of what an int64 holds


class _Bucket:
    """Gradients that are summed together.

    `floats` (P,) holds those of a unit, and in the end the sums; `views` are its tensors, in the
    memory formats of the parameters. `integers` holds the sums in fixed point: `numbers`
    (parts, P), where float64 has a second part for what the first one rounds off, and `counts`
    (3, parameters): how often a tensor had a NaN, an infinity, or a number beyond the range.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[nn.Parameter]) -> None:
        self.names, self.parameters = names, parameters
        self.missing = 0  # gradients of the present pass
        first, sizes = parameters[0], [parameter.numel() for parameter in parameters]
        parts = 2 if first.dtype == torch.float64 else 1
        self.floats = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        pairs = zip(self.floats.split(sizes), parameters, strict=True)
        self.views = [t.as_strided(p.size(), p.stride(), t.storage_offset()) for t, p in pairs]
        numbers = parts * sum(sizes)
        self.integers = torch.zeros(
            numbers + 3 * len(sizes), dtype=torch.int64, device=first.device
        )
        self.numbers = self.integers[:numbers].view(parts, -1)
        self.counts = self.integers[numbers:].view(3, -1)

    def begin_pass(self) -> None:
        """Expect a gradient of each parameter."""
        self.missing = len(self.parameters)

    def completed_by_gradient(self) -> bool:
        """Count a gradient that has become final; return True for the last one of a pass."""
        self.missing -= 1
        return self.missing == 0

    def check_complete(self) -> None:
        """Raise RuntimeError where a pass left a parameter without a gradient."""
        if self.missing:
            pairs = zip(self.names, self.parameters, strict=True)
            raise RuntimeError(f"{next(n for n, p in pairs if p.grad is None)}: got no gradient")

    def add_gradients(self, scale: Tensor, largest: float) -> None:
        """Round the gradients of a unit, times the losses' `scale`, to fixed point; add them.

        A tensor with a magnitude above `largest` is beyond the range. The gradients are dropped.
        """
        copy_all(self.views, [p.grad for p in self.parameters if p.grad is not None])
        for parameter in self.parameters:
            parameter.grad = None
        magnitudes = greatest_magnitudes(self.views) / scale
        infinite, beyond = magnitudes.isinf(), magnitudes > largest
        self.counts.add_(torch.stack([magnitudes.isnan(), infinite, beyond & ~infinite]))
        values = self.floats.mul_(QUANTA / scale)  # powers of two: nothing is rounded yet
        whole = torch.round(values)
        self.numbers[0].add_(whole.to(torch.int64))
        if len(self.numbers) > 1:
            rest = values.sub_(whole).mul_(FINE_QUANTA / QUANTA).round_()
            self.numbers[1].add_(rest.to(torch.int64))

    def gradients(self, scale: Tensor) -> list[Tensor]:
        """Return the sums, times the losses' `scale`, in the views.

        A tensor that had a NaN or an infinity somewhere, in any unit, is NaN or infinite as a
        whole; a number beyond the range counts as infinite.
        """
        self.floats.copy_(self.numbers[0]).mul_(scale / QUANTA)
        if len(self.numbers) > 1:
            self.floats.add_(self.numbers[1].to(self.floats.dtype) * (scale / FINE_QUANTA))
        nan, infinite, beyond = (self.counts > 0).unbind()
        lost = torch.zeros_like(self.counts[0], dtype=self.floats.dtype)
        lost.masked_fill_(infinite | beyond, torch.inf).masked_fill_(nan, torch.nan)
        for view, value in zip(self.views, lost.unbind(), strict=True):
            view.add_(value)
        return self.views


class ExactSums:
    """Sums of a step in integers: the same bits on any number of ranks, in whatever order.

    Each pass must be of one unit. The sum of a bucket over the ranks begins in the last pass, as
    soon as its gradients are final, and is overlapped with the rest of it (section 4). float16's
    scale, a power of two, is taken out while gradients are integers. All ranks keep the running
    statistics of all workers.
    """

    def __init__(
        self,
        model: nn.Module,
        running_statistics: RunningStatistics,
        minibatch: Minibatch,
        world: World,
        scaler: torch.amp.GradScaler,
        observers: Sequence[StepObserver] = (),
    ) -> None:
        self.model, self._running_statistics = model, running_statistics
        self._workers, self._sums_over_ranks = minibatch.workers, world.world_size > 1
        self._scaler, self._observers = scaler, tuple(observers)
        self._largest = LARGEST_SUM / minibatch.units / QUANTA  # of a unit's gradient
        self._one = torch.ones((), device=world.device)
        self._buckets = fill_buckets(model)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._take, bucket))
            for bucket in self._buckets
            for parameter in bucket.parameters
        ]
        self._statistics = to_fixed_point(running_statistics.step_sums()).zero_()
        self._in_pass = self._is_last = False
        self._sent = 0  # buckets
        self._works: list[dist.Work] = []
        self._beyond: list[tuple[int, Tensor]] = []  # step, and counts (parameters,)
        if self._sums_over_ranks:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), 0)  # as DDP does: start weights are rank 0's

    @contextmanager
    def of_pass(self, is_last: bool) -> Iterator[None]:
        for bucket in self._buckets:
            bucket.begin_pass()
        self._in_pass, self._is_last = True, is_last
        try:
            yield
        finally:
            self._in_pass = False
        for bucket in self._buckets:
            bucket.check_complete()
        self._statistics += to_fixed_point(self._running_statistics.step_sums())
        self._running_statistics.forget()
        if is_last:
            self._send(self._statistics)

    @torch.no_grad()
    def _take(self, bucket: _Bucket, parameter: nn.Parameter) -> None:
        """Add a bucket's gradients once all are there; in the last pass, send what is complete."""
        if not (self._in_pass and bucket.completed_by_gradient()):
            return
        bucket.add_gradients(self._scale(), self._largest)
        # in the same order on all ranks, whatever the order in which they are complete
        while self._is_last and self._sent < len(self._buckets):
            if self._buckets[self._sent].missing:
                break
            self._send(self._buckets[self._sent].integers)
            self._sent += 1
            for observer in self._observers if self._sums_over_ranks else ():
                observer.on_bucket_sent(self._sent == len(self._buckets))

    def _send(self, integers: Tensor) -> None:
        if self._sums_over_ranks and integers.numel():
            work = dist.all_reduce(integers, async_op=True)
            assert work is not None  # as it is asynchronous
            self._works.append(work)

    def _scale(self) -> Tensor:
        """Return the factor of the losses, on the device: 1 but in float16."""
        scale: Tensor = self._scaler.scale(self._one)
        return scale

    @torch.no_grad()
    def finish(self, step: int) -> None:
        for work in self._works:
            work.wait()
        for bucket in self._buckets:
            for parameter, gradient in zip(
                bucket.parameters, bucket.gradients(self._scale()), strict=True
            ):
                parameter.grad = gradient
        self._beyond.append((step, torch.cat([bucket.counts[2] for bucket in self._buckets])))
        self._forget_gradients()

    @torch.no_grad()
    def local_sums(self) -> tuple[list[Tensor], list[Tensor]]:
        scale = self._scale()
        gradients = [gradient for bucket in self._buckets for gradient in bucket.gradients(scale)]
        return gradients, [from_fixed_point(self._statistics)]

    def update_running_statistics(self, local_workers: int) -> None:
        self._running_statistics.update(self._workers, from_fixed_point(self._statistics))
        self._statistics.zero_()

    def take_beyond_range(self) -> tuple[int, str] | None:
        recorded, self._beyond = self._beyond, []
        if not recorded or not torch.stack([counts for _, counts in recorded]).any():
            return None
        names = [name for bucket in self._buckets for name in bucket.names]
        step, counts = next((step, counts) for step, counts in recorded if counts.any())
        return step, names[int(counts.argmax())]

    def forget(self) -> None:
        self._running_statistics.forget()
        self._statistics.zero_()
        self._beyond = []
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        self._works, self._sent = [], 0
        for bucket in self._buckets:
            bucket.integers.zero_()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def fill_buckets(model: nn.Module) -> list[_Bucket]:
    """Distribute the trained parameters over buckets, as DDP does: the last ones first."""
    buckets, names, parameters = [], list[str](), list[nn.Parameter]()
    count, limit = 0, FIRST_BUCKET_BYTES
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in reversed(trained):
        names.append(name.removeprefix("network."))  # of the replica
        parameters.append(parameter)
        count += parameter.numel() * parameter.element_size()
        if count >= limit or parameter is trained[0][1]:
            buckets.append(_Bucket(names, parameters))
            names, parameters, count, limit = [], [], 0, BUCKET_BYTES
    return buckets
