"""The metrics of training steps, kept on the device and summed when a line is logged."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.exact_sum import exact_sum
from harness.recipe.losses import UNLABELLED


@dataclass(frozen=True)
class TrainMetrics:
    """Global means over the steps since the last call of `read`."""

    loss: float
    error: float  # training error in %, of the labelled images
    replaced: int  # images that could not be decoded
    overflows: int  # float16: skipped updates
    overflows_in_row: int  # up to the last step
    first_bad_step: int | None  # the first step with a loss that is not finite
    kl: float | None = None  # KL divergence of the student from its teacher; None without one
    labelled_shares: list[float] = field(default_factory=list)  # step by step


class Metrics:
    """Collects the metrics of steps until they are read; adding to it never synchronises.

    Nothing is summed before it is read: a small operation costs as much in each step as at a log
    line, where one replaces those of many steps.
    """

    def __init__(self, device: torch.device, minibatch: int) -> None:
        self.device, self.minibatch = device, minibatch
        self._steps: list[int] = []
        self._overflows: list[Tensor] = []  # one per step in float16
        # per micro-batch: loss, correct images, labelled images, and KL with a teacher
        self._local: list[tuple[Tensor, ...]] = []
        self._overflows_in_row = 0

    def add_micro_batch(
        self, loss: Tensor, logits: Tensor, labels: Tensor, kl: Tensor | None = None
    ) -> None:
        """Add a micro-batch. `loss` and `kl` are its share of the step's; `logits` (B, K)."""
        correct = (logits.argmax(1) == labels).sum()
        counts = loss.detach(), correct, (labels != UNLABELLED).sum()
        self._local.append(counts if kl is None else (*counts, kl))

    def end_step(self, step: int, overflow: Tensor | None = None) -> None:
        """End step `step`; `overflow` is 1.0 where float16 gradients overflowed, else 0.0.

        The update of such a step was skipped. It counts as no divergence, and its loss enters no
        mean.
        """
        self._steps.append(step)
        if overflow is not None:
            self._overflows.append(overflow)

    def read(self, local_replaced: int = 0) -> TrainMetrics:
        """Return the means over all ranks since the last call. Synchronises device and ranks."""
        overflowed = self._overflowed()
        local = self._local_by_step().masked_fill_(overflowed.to(self.device)[:, None], 0.0)
        replaced = torch.zeros_like(local[:1])
        replaced[0, 0, 0] = local_replaced
        # the same bits on any number of ranks, and a value that is not finite is seen by all
        losses, correct, labelled, *kl, replaced = exact_sum(torch.cat([local, replaced])).tolist()
        counted = max(len(self._steps) - int(overflowed.sum()), 1)
        bad = [
            step for step, loss in zip(self._steps, losses, strict=True) if not math.isfinite(loss)
        ]
        metrics = TrainMetrics(
            loss=sum(losses) / counted,
            error=100.0 * (1.0 - sum(correct) / sum(labelled)) if any(labelled) else math.nan,
            labelled_shares=[images / self.minibatch for images in labelled],
            kl=sum(kl[0]) / counted if kl else None,
            replaced=int(sum(replaced)),
            overflows=int(overflowed.sum()),
            overflows_in_row=self._overflows_in_row,
            first_bad_step=bad[0] if bad else None,
        )
        self._steps.clear()
        self._overflows.clear()
        self._local.clear()
        return metrics

    def _local_by_step(self) -> Tensor:
        """Return this rank's loss, correct and labelled images, and KL, (3 or 4, steps, passes).

        They are float64. A rank has the same number of micro-batches in each step.
        """
        columns = [torch.stack(column).double() for column in zip(*self._local, strict=True)]
        return torch.stack(columns).view(len(columns), len(self._steps), -1)

    def _overflowed(self) -> Tensor:
        """Return which steps overflowed, (steps,) bool on the host; count those in a row."""
        if not self._overflows:
            return torch.zeros(len(self._steps), dtype=torch.bool)
        overflowed = (torch.stack(self._overflows) > 0).cpu()
        for yes in overflowed.tolist():
            self._overflows_in_row = self._overflows_in_row + 1 if yes else 0
        return overflowed
