"""Training losses: cross entropy with labels, with a teacher's soft targets, and their sum."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

UNLABELLED = -1  # the label of an image without one


def training_loss(
    logits: Tensor, labels: Tensor, global_batch: int, label_smoothing: float
) -> Tensor:
    """Cross entropy of local logits (B, K) and labels (B,), summed over B and divided by kn.

    `global_batch` is kn: section 3, remark 3, "Normalize the per-worker loss by total minibatch
    size kn, not per-worker size n". Computed in at least float32. The target is
    (1 - ε) onehot + ε / K (Szegedy et al. 2016, section 7); an image without a label adds nothing,
    and is counted in kn all the same. Raises ValueError for ε outside [0, 1].
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
    """T² times the cross entropy with a teacher's soft targets, summed over B, divided by kn.

    Hinton et al. 2015 (arXiv 1503.02531), section 2: both logits, (B, K), are softened,
    q_i = exp(z_i / T) / Σ_j exp(z_j / T). The gradient falls as 1/T², which T² makes up for:
    Σ over B of T (q - p) / kn, near (z - v) / (K kn) at a large T. Computed in at least float32.
    Raises ValueError for T <= 0.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature {temperature} is not above 0")
    targets = (_in_float32(teacher_logits) / temperature).softmax(1)
    logits = _in_float32(logits)
    total = F.cross_entropy(logits / temperature, targets.to(logits.dtype), reduction="sum")
    return temperature**2 * total / global_batch


def _in_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
