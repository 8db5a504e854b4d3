"""Fixed-point sums against rational arithmetic, in every order, and at the ends of the range."""

import math
from fractions import Fraction

import pytest
import torch

from harness.exact_sum import COARSE, FINE, LIMIT, MOST_TERMS, exact_sum, to_fixed_point

TERMS = torch.tensor(
    [1e9, -1e9, 3.3e-7, 1.0, -0.125, 2.5e-16, 123.456, -7e5, 1 / 3, 4e9, -3.999e9],
    dtype=torch.float64,
)


def rounded(term: float) -> Fraction:
    """A term to the nearest multiple of 2**-53, by integers of any size."""
    return Fraction(round(Fraction(term) * 2**53), 2**53)


def test_the_sum_is_that_of_rational_arithmetic():
    total = float(sum(rounded(term) for term in TERMS.tolist()))
    assert float(exact_sum(TERMS)) == pytest.approx(total, rel=2**-52, abs=0)


def test_every_order_and_grouping_gives_the_same_bits():
    generator = torch.Generator().manual_seed(1)
    found, by_floats = set(), set()
    for _ in range(200):
        order = TERMS[torch.randperm(len(TERMS), generator=generator)]
        found.add(float(exact_sum(order)))
        parts = to_fixed_point(order[:4]).sum(-1) + to_fixed_point(order[4:]).sum(-1)
        assert torch.equal(parts, to_fixed_point(TERMS).sum(-1))
        by_floats.add(float(order.sum()))
    assert len(found) == 1
    assert len(by_floats) > 1  # or the test shows nothing


def test_a_float32_term_above_a_billionth_keeps_all_its_bits():
    """Its last bit is worth 2**-53 or more: 2**-30 * 2**-23."""
    terms = torch.rand(1000, generator=torch.Generator().manual_seed(2)) + 2**-30
    assert torch.equal(exact_sum(terms[:, None]).float(), terms)


def test_no_sum_of_so_many_terms_overflows():
    coarse, fine, *_ = to_fixed_point(torch.tensor([LIMIT], dtype=torch.float64)).tolist()
    assert coarse == [int(LIMIT * COARSE)] == [2**42]
    assert MOST_TERMS * coarse[0] == 2**62
    worst = to_fixed_point(torch.tensor([0.5 / COARSE], dtype=torch.float64))[1].item()
    assert abs(worst) == 2**42 == FINE / COARSE / 2  # the most that the coarse part can leave
    assert fine == [0]


@pytest.mark.parametrize(
    ("terms", "total"),
    [
        ([1.0, math.inf], math.inf),
        ([-math.inf, 5.0], -math.inf),
        ([math.inf, -math.inf], math.nan),
        ([math.nan, 1.0], math.nan),
        ([2 * LIMIT, 1.0], math.inf),
        ([-2 * LIMIT, 1.0], -math.inf),
        ([LIMIT, -LIMIT], 0.0),
    ],
)
def test_what_is_no_number_stays_what_it_is(terms, total):
    found = float(exact_sum(torch.tensor(terms, dtype=torch.float64)))
    assert found == total or (math.isnan(found) and math.isnan(total))
