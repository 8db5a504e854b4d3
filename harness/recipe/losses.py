"""Training losses: cross entropy with labels, and with a teacher's soft targets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.config.distill_section import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE

UNLABELLED = -1  # the label of an image without one


def training_loss(
    logits: Tensor, labels: Tensor, global_batch: int, label_smoothing: float
) -> Tensor:
    """Return the cross entropy of logits (B, K) and labels (B,), summed over B, divided by kn.

    `global_batch` is kn: section 3, remark 3, "Normalize the per-worker loss by total minibatch
    size kn, not per-worker size n". Computed in at least float32. The target is
    (1 - ε) onehot + ε / K (Szegedy et al. 2016, section 7); an image without a label adds nothing
    but counts in kn. Raises ValueError for ε outside [0, 1].
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing {label_smoothing} is not in [0, 1]")
    total = F.cross_entropy(
        _in_float32(logits),
        labels,
        reduction="sum",
        ignore_index=UNLABELLED,
        label_smoothing=label_smoothing,
    )
    return total / global_batch


def soft_loss(
    logits: Tensor, teacher_logits: Tensor, global_batch: int, temperature: float
) -> Tensor:
    """Return T² times the cross entropy with soft targets, summed over B, divided by kn.

    Hinton et al. 2015 (arXiv 1503.02531), section 2: both logits, (B, K), are softened,
    q_i = exp(z_i / T) / Σ_j exp(z_j / T). The gradient falls as 1/T², which T² compensates:
    Σ over B of T (q - p) / kn, near (z - v) / (K kn) at a large T. Computed in at least float32.
    Raises ValueError for T outside [LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE].
    """
    softened, targets = _soften(logits, teacher_logits, temperature)
    total = F.cross_entropy(softened, targets, reduction="sum")
    return temperature**2 * total / global_batch


@torch.no_grad()
def kl_divergence(
    logits: Tensor, teacher_logits: Tensor, global_batch: int, temperature: float
) -> Tensor:
    """Return KL(p || q) in nats of teacher p and student q, summed over B, divided by kn.

    Both (B, K) are softened as in `soft_loss`, which is T² times this plus T² times the entropy of
    p, a constant of the teacher: both have the same gradient, but only this one is 0 where the
    student agrees. For the log, without gradient.
    """
    softened, targets = _soften(logits, teacher_logits, temperature)
    return F.kl_div(softened.log_softmax(1), targets, reduction="sum") / global_batch


def _soften(logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the student's logits divided by T, and the teacher's targets in their dtype."""
    if not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        bounds = f"[{LOWEST_TEMPERATURE}, {HIGHEST_TEMPERATURE:g}]"
        raise ValueError(f"temperature {temperature} is not in {bounds}")
    targets = (_in_float32(teacher_logits) / temperature).softmax(1)
    logits = _in_float32(logits)
    return logits / temperature, targets.to(logits.dtype)


def _in_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
