"""Exact distributed evaluation: integer counts over every validation image, each once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.config.schema import Config
from harness.data.batch import Batch
from harness.distributed import sum_over_ranks
from harness.exact_sum import exact_sum
from harness.execution.compilation import uncompiled
from harness.execution.precision import autocast, master_dtype
from harness.execution.preprocess import Preprocess


@dataclass(frozen=True)
class Evaluation:
    """Counts over the whole validation set, and errors in %."""

    correct: int
    top5_correct: int
    total: int
    loss: float

    @property
    def error(self) -> float:
        """Top-1 error in %."""
        return 100.0 * (self.total - self.correct) / self.total

    @property
    def top5_error(self) -> float:
        """Top-5 error in % (all classes, where there are fewer than 5)."""
        return 100.0 * (self.total - self.top5_correct) / self.total

    def error_interval(self) -> tuple[float, float]:
        """Return Wilson's 95 % interval of the top-1 error, in %."""
        z, n = 1.959964, self.total
        p = (n - self.correct) / n
        centre = p + z * z / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
        return 100.0 * max(low, 0.0), 100.0 * min(high, 1.0)


def logits_of(config: Config, model: nn.Module, preprocess: Preprocess, pixels: Tensor) -> Tensor:
    """Return the logits (B, K), in the master format, of uint8 images (B, 3, H, W)."""
    with uncompiled(config), autocast(config, preprocess.device):
        logits: Tensor = model(preprocess(pixels))
    return logits.to(master_dtype(config.run.precision))


@torch.no_grad()
def evaluate(
    config: Config,
    model: nn.Module,
    batches: Iterable[Batch],
    preprocess: Preprocess,
    watch: Callable[[Batch, Tensor], None] | None = None,
) -> Evaluation:
    """Evaluate this rank's share of the validation set and sum the counts over the ranks.

    `watch` is called with each batch and its logits (B, K). Raises RuntimeError where the total is
    not the size of the data set. Synchronises device and ranks once, at the end.
    """
    was_training = model.training
    model.eval()
    local_counts = torch.zeros(3, dtype=torch.int64, device=preprocess.device)
    local_losses = [torch.zeros((), dtype=torch.float64, device=preprocess.device)]
    for batch in batches:
        labels = batch.labels.to(preprocess.device, non_blocking=True)
        logits = logits_of(config, model, preprocess, batch.images)
        top = logits.topk(min(5, logits.shape[1])).indices
        hits = top == labels[:, None]
        local_counts[:2] += torch.stack([hits[:, 0].sum(), hits.sum()])
        local_counts[2] += len(labels)
        local_losses.append(F.cross_entropy(logits, labels, reduction="sum").double())
        if watch is not None:
            watch(batch, logits)
    model.train(was_training)
    correct, top5_correct, total = sum_over_ranks(local_counts).tolist()
    loss = float(exact_sum(torch.stack(local_losses)))
    if total != config.data.val_images:
        raise RuntimeError(f"evaluation counted {total} images of {config.data.val_images}")
    return Evaluation(correct, top5_correct, total, loss / total)
