"""The rows of a cache's files: how the logits of an image are stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.errors import UserError


@dataclass(frozen=True)
class Rows:
    """The format of an image's logits: all, or the `top` largest and one logit for all others."""

    classes: int
    dtype: str  # float16 | float32
    top: int | None

    @property
    def type(self) -> np.dtype:
        """The NumPy type of a row."""
        if self.top is None:
            return np.dtype((self.dtype, (self.classes,)))
        number = np.min_scalar_type(self.classes)
        kept = [("classes", number, (self.top,)), ("logits", self.dtype, (self.top,))]
        return np.dtype([*kept, ("others", self.dtype)])

    @np.errstate(over="ignore")  # refused below
    def encode(self, logits: Tensor, temperature: float) -> np.ndarray:
        """Return rows (B,) of float32 logits (B, K). Raises UserError where float16 overflows.

        The other classes get the logit T log mean exp(z / T) over them. Softened at T =
        `temperature` their targets then have the true sum, and the `top` largest their true values.
        """
        if self.top is None:
            rows = logits.numpy().astype(self.dtype)
            values = [rows]
        else:
            largest = logits.topk(self.top)
            others = logits.scatter(1, largest.indices, -torch.inf)
            log_sum = (others / temperature).logsumexp(1)
            rows = np.empty(len(logits), self.type)
            rows["classes"], rows["logits"] = largest.indices.numpy(), largest.values.numpy()
            rows["others"] = temperature * (log_sum - math.log(self.classes - self.top)).numpy()
            values = [rows["logits"], rows["others"]]
        if not all(np.isfinite(numbers).all() for numbers in values):
            raise UserError(f"a logit of the teacher does not fit {self.dtype}; see its run")
        return rows

    def decode(self, rows: np.ndarray) -> NDArray[np.float32]:
        """Return the logits (B, K) of rows (B,)."""
        if self.top is None:
            return rows.astype(np.float32)
        logits = np.repeat(rows["others"].astype(np.float32)[:, None], self.classes, axis=1)
        np.put_along_axis(logits, rows["classes"].astype(np.int64), rows["logits"], axis=1)
        return logits
