"""The sum of gradients and of batch norm's statistics over a step: by floats, as DDP does it."""

# no postponed annotations here: DDP checks those of a communication hook
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.compat import buffer_sync_off
from harness.config.schema import Config
from harness.distributed import World
from harness.models.ghost_batch_norm import RunningStatistics
from harness.resilience.step_observer import StepObserver


class StepSums(Protocol):
    """The sums of a step over its micro-batches and all ranks. `model` runs a micro-batch."""

    model: nn.Module

    def of_pass(self, is_last: bool) -> AbstractContextManager[object]:
        """Return a context for one micro-batch's passes; `is_last` of the step on this rank."""
        ...

    def finish(self, step: int) -> None:
        """Give each parameter the sum over all ranks as its gradient, after the last pass."""
        ...

    def local_sums(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return this rank's sums so far: of gradients, and of batch norm's statistics."""
        ...

    def update_running_statistics(self, local_workers: int) -> None:
        """Apply the step's statistics; this rank has normalized so many workers."""
        ...

    def take_beyond_range(self) -> tuple[int, str] | None:
        """Return the first step since the last call whose sum was beyond the range of numbers.

        With it comes the parameter's name. All ranks find the same; it waits for the device.
        """
        ...

    def forget(self) -> None:
        """Drop all that was summed since the last step."""
        ...

    def close(self) -> None:
        """Leave the network as it was found; the sums cannot be used any more."""
        ...


class FloatSums:
    """Sums in floats: fast, with bits that depend on the order, and so on the number of ranks.

    Running statistics are those of this rank's workers, until they are merged for an evaluation or
    a checkpoint (`models/running_statistics.py`).
    """

    def __init__(
        self,
        model: nn.Module,
        running_statistics: RunningStatistics,
        config: Config,
        world: World,
        observers: Sequence[StepObserver] = (),
    ) -> None:
        self.model = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._running_statistics = running_statistics
        if world.world_size > 1:
            # workers keep their own statistics, so no rank's are sent to others (section 2.3)
            ddp = DistributedDataParallel(
                model,
                device_ids=[world.device.index] if world.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **buffer_sync_off(),  # type: ignore[arg-type]
            )
            in_bfloat16 = config.run.gradient_precision == "bfloat16"
            dtype = torch.bfloat16 if in_bfloat16 else None
            GradientReducer(dtype, observers).register(ddp)
            self.model = ddp

    def of_pass(self, is_last: bool) -> AbstractContextManager[object]:
        if not is_last and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()

    def finish(self, step: int) -> None:
        pass  # DDP sums within the last backward pass

    def local_sums(self) -> tuple[list[Tensor], list[Tensor]]:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return gradients, self._running_statistics.sums

    def update_running_statistics(self, local_workers: int) -> None:
        self._running_statistics.update(local_workers)

    def take_beyond_range(self) -> tuple[int, str] | None:
        return None  # floats become infinite, which the loss shows

    def forget(self) -> None:
        self._running_statistics.forget()

    def close(self) -> None:
        self.model = nn.Identity()  # DDP takes its hooks off as it goes


@dataclass(frozen=True)
class GradientReducer:
    """A DDP communication hook that sums gradients over all ranks instead of averaging them.

    `dtype`: the format in which gradients are sent and summed; None keeps their own.
    """

    dtype: torch.dtype | None = None
    observers: Sequence[StepObserver] = ()

    def register(self, ddp: DistributedDataParallel) -> None:
        """Make `ddp` reduce its gradients this way."""
        ddp.register_comm_hook(self, GradientReducer.sum_bucket)

    def sum_bucket(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Start the sum of one bucket over all ranks.

        Remark 3 (section 3): each image's loss is divided by kn, so the all-reduce sums; the
        backward pass of an image is then independent of the number of ranks, in float16 too. In
        bfloat16 (`run.gradient_precision`) each rank's gradients and their partial sums are
        rounded to 8 bits.
        """
        for observer in self.observers:
            observer.on_bucket_sent(bucket.is_last())
        gradients = bucket.buffer()
        own_type = self.dtype in (None, gradients.dtype)
        sent = gradients if own_type else gradients.to(self.dtype)
        work = dist.all_reduce(sent, async_op=True)

        def received(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            summed = future.value()[0]
            return summed if own_type else gradients.copy_(summed)

        return work.get_future().then(received)
