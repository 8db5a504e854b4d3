"""Training losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def training_loss(
    logits: Tensor, labels: Tensor, global_batch: int, label_smoothing: float
) -> Tensor:
    """Cross entropy of local logits (B, K) and labels (B,), summed over B and divided by kn.

    `global_batch` is kn: section 3, remark 3, "Normalize the per-worker loss by total minibatch
    size kn, not per-worker size n". Computed in at least float32. The target is
    (1 - ε) onehot + ε / K (Szegedy et al. 2016, section 7). Raises ValueError for ε outside [0, 1].
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing {label_smoothing} is not in [0, 1]")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    return total / global_batch
