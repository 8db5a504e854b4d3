"""Sums over training steps, kept on the device and read only when a line is logged."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.distributed import min_over_ranks, sum_over_ranks
from harness.recipe.losses import UNLABELLED

NEVER = 2**62


@dataclass(frozen=True)
class Reading:
    """Global means since the last reading."""

    loss: float
    error: float  # training error in %, of the labelled images
    replaced: int  # images that could not be decoded
    overflows: int  # float16: updates that were skipped
    overflows_in_row: int  # up to the last step
    first_bad_step: int | None  # the first step with a loss that is not finite
    labelled_shares: list[float] = field(default_factory=list)  # step by step


class Metrics:
    """Local sums of the steps since the last reading; adding to them never synchronises."""

    def __init__(self, device: torch.device, minibatch: int) -> None:
        self.minibatch, self.steps = minibatch, 0
        self.local_sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.local_step = torch.zeros(3, dtype=torch.float64, device=device)
        self.step_loss, self.step_correct, self.step_labelled = self.local_step.unbind()  # views
        self.local_labelled: list[Tensor] = []  # of each step
        self.overflows = torch.zeros((), dtype=torch.float64, device=device)
        self.overflows_in_row = torch.zeros((), dtype=torch.float64, device=device)
        self.local_first_bad_step = torch.full((), NEVER, dtype=torch.int64, device=device)

    def add_micro_batch(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """`loss`: the micro-batch's share of the step's loss, Σ/(kn); `logits`: (B, K)."""
        self.step_loss.add_(loss.detach())
        self.step_correct.add_((logits.detach().argmax(1) == labels).sum())
        self.step_labelled.add_((labels != UNLABELLED).sum())

    def end_step(self, step: int, overflow: Tensor | None = None) -> None:
        """`overflow`: 1.0 where float16 gradients overflowed, so that the update was skipped.

        Such a step is counted by itself: it is no divergence, and its loss is in no mean.
        """
        fine = self.step_loss.isfinite()
        if overflow is not None:
            self.overflows += overflow
            self.overflows_in_row.add_(overflow).mul_(overflow)
            fine |= overflow > 0
            self.local_step.masked_fill_(overflow > 0, 0.0)
        self.local_first_bad_step.clamp_(max=torch.where(fine, NEVER, step))
        self.local_sums += self.local_step
        self.local_labelled.append(self.step_labelled.clone())
        self.local_step.zero_()
        self.steps += 1

    def read(self, local_replaced: int = 0) -> Reading:
        """Means over the ranks since the last reading. Synchronises device and ranks."""
        first_bad_step = int(min_over_ranks(self.local_first_bad_step.clone()))
        replaced = self.local_sums.new_tensor([local_replaced])
        local = torch.cat([self.local_sums, replaced, *(n[None] for n in self.local_labelled)])
        loss, correct, labelled, replaced, *by_step = sum_over_ranks(local).tolist()
        overflows = int(self.overflows)
        counted = max(self.steps - overflows, 1)
        reading = Reading(
            loss=loss / counted,
            error=100.0 * (1.0 - correct / labelled) if labelled else math.nan,
            labelled_shares=[images / self.minibatch for images in by_step],
            replaced=int(replaced),
            overflows=overflows,
            overflows_in_row=int(self.overflows_in_row),
            first_bad_step=None if first_bad_step == NEVER else first_bad_step,
        )
        self.local_sums.zero_()
        self.overflows.zero_()
        self.local_labelled.clear()
        self.steps = 0
        return reading
