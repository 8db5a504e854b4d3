"""The sum of gradients over the ranks."""

# no postponed annotations here: DDP checks those of a communication hook
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from harness.resilience.step_observer import StepObserver


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
