"""Sums with the same bits in whatever order and on however many ranks they are taken.

A sum of floats depends on its order, a sum of integers does not. Each float becomes integers in
fixed point, these are summed over terms and ranks, and the total becomes a float again.
docs/one-curve.md argues range and resolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.distributed import sum_over_ranks

LIMIT = 2.0**32  # of a term's magnitude; beyond it, a term counts as infinite
COARSE, FINE = 2.0**10, 2.0**53  # quanta in 1: each of 2**20 terms has at most 2**42 of either
MOST_TERMS = 2**20


def to_fixed_point(terms: Tensor) -> Tensor:
    """Return int64 (4, *shape) of float terms, to be summed in any order.

    They are the coarse and the fine part, and whether the term has a positive or a negative
    infinity; NaN has both. Does not wait for the device.
    """
    values = terms.detach().double()
    finite = torch.where(values.abs() <= LIMIT, values, 0.0)
    coarse = torch.round(finite * COARSE)
    fine = torch.round((finite - coarse / COARSE) * FINE)
    above, below = ~(values <= LIMIT), ~(values >= -LIMIT)  # both for NaN
    return torch.stack([coarse, fine, above.double(), below.double()]).to(torch.int64)


def from_fixed_point(sums: Tensor) -> Tensor:
    """Return the float64 total (*shape) of at most 2**20 terms' integers (4, *shape)."""
    coarse, fine, above, below = sums.unbind()
    total = coarse.double() / COARSE + fine.double() / FINE
    total = total.masked_fill(above > 0, torch.inf)
    total = total.masked_fill(below > 0, -torch.inf)
    return total.masked_fill((above > 0) & (below > 0), torch.nan)


def exact_sum(terms: Tensor) -> Tensor:
    """Return the float64 sums (*shape) over the last dimension of (*shape, T) and over all ranks.

    They are the same bits however the terms are distributed. Infinities and NaN stay what they are.
    Synchronises the ranks.
    """
    return from_fixed_point(sum_over_ranks(to_fixed_point(terms).sum(-1)))
