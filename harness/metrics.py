"""Sums over training steps, kept on the device and read only when a line is logged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.distributed import min_over_ranks, sum_over_ranks

NEVER = 2**62


@dataclass(frozen=True)
class Reading:
    """Global means since the last reading."""

    loss: float
    error: float  # training error in %
    images: int
    replaced: int  # images that could not be decoded
    overflows: int  # float16: updates that were skipped
    overflows_in_row: int  # up to the last step
    first_bad_step: int | None  # the first step with a loss that is not finite


class Metrics:
    """Local sums of the steps since the last reading; adding to them never synchronises."""

    def __init__(self, device: torch.device) -> None:
        # loss, correct, images, steps: of the steps that count (not those that overflowed)
        self.local_sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.local_step = torch.zeros(4, dtype=torch.float64, device=device)
        self.overflows = torch.zeros((), dtype=torch.float64, device=device)
        self.overflows_in_row = torch.zeros((), dtype=torch.float64, device=device)
        self.local_first_bad_step = torch.full((), NEVER, dtype=torch.int64, device=device)

    def add_micro_batch(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """`loss`: the micro-batch's share of the step's loss, Σ/(kn); `logits`: (B, K)."""
        self.local_step[0] += loss.detach()
        self.local_step[1] += (logits.detach().argmax(1) == labels).sum()
        self.local_step[2] += len(labels)

    def end_step(self, step: int, overflow: Tensor | None = None) -> None:
        """`overflow`: 1.0 where float16 gradients overflowed, so that the update was skipped.

        Such a step is counted by itself: it is no divergence, and its loss is in no mean.
        """
        self.local_step[3] = 1.0
        bad = ~torch.isfinite(self.local_step[0])
        if overflow is not None:
            self.overflows += overflow
            self.overflows_in_row.add_(overflow).mul_(overflow)
            bad &= overflow == 0
            self.local_step.masked_fill_(overflow > 0, 0.0)
        self.local_first_bad_step.clamp_(max=torch.where(bad, step, NEVER))
        self.local_sums += self.local_step
        self.local_step.zero_()

    def read(self, local_replaced: int = 0) -> Reading:
        """Means over the ranks since the last reading. Synchronises device and ranks."""
        first_bad_step = int(min_over_ranks(self.local_first_bad_step.clone()))
        # every rank counts the same steps, so that they need no sum, and lend their place to one
        steps = float(self.local_sums[3])
        self.local_sums[3] = local_replaced
        loss, correct, images, replaced = sum_over_ranks(self.local_sums).tolist()
        reading = Reading(
            loss=loss / max(steps, 1.0),
            error=100.0 * (1.0 - correct / max(images, 1.0)),
            images=int(images),
            replaced=int(replaced),
            overflows=int(self.overflows),
            overflows_in_row=int(self.overflows_in_row),
            first_bad_step=None if first_bad_step == NEVER else first_bad_step,
        )
        self.local_sums.zero_()
        self.overflows.zero_()
        return reading
