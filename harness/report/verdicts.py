"""Tests of a group's error against the expected one: two-sided, at 5 %, corrected by Holm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # Student's t; scipy.stats takes a second longer to import

from harness.config.schema import NO_EXPECTATION
from harness.report.groups import Group

LEVEL = 0.05  # the probability of any false alarm among all rows of a report


@dataclass(frozen=True)
class Verdict:
    """The result of a test. `kind` is within, lower, higher or "" (untested); `basis` says why."""

    kind: str
    basis: str


def verdicts(groups: Sequence[Group]) -> list[Verdict]:
    """Return one verdict per group. The testable groups share the level of 5 %."""
    reasons = [_untestable(group) for group in groups]
    tested = [group for group, reason in zip(groups, reasons, strict=True) if not reason]
    alone = [_p_value(group) for group in tested]
    pairs = iter(zip(alone, holm(alone), strict=True))
    return [
        Verdict("", reason) if reason else _verdict(group, *next(pairs), len(tested))
        for group, reason in zip(groups, reasons, strict=True)
    ]


def _untestable(group: Group) -> str:
    """Return why a group cannot be tested; "" if it can."""
    if group.expect is None:
        return NO_EXPECTATION
    if not group.errors:
        return "no finished run"
    missing = [key for key in ("std", "runs") if getattr(group.expect, key) is None]
    return f"no verdict: expect has no {' and no '.join(missing)}" if missing else ""


def _p_value(group: Group) -> float:
    error, std, runs = _expected(group)
    return float(p_values(group.errors, error, std, runs, image_points(group)))


def _expected(group: Group) -> tuple[float, float, int]:
    """Return the expected error, std and number of runs of a testable group."""
    expect = group.expect
    assert expect is not None and expect.std is not None and expect.runs is not None
    return expect.error, expect.std, expect.runs


def image_points(group: Group) -> float:
    """Return the weight of one validation image in percentage points."""
    return 100 / group.config.data.val_images


def p_values(
    errors: ArrayLike, mean: ArrayLike, std: ArrayLike, m: int, image: float
) -> NDArray[np.float64]:
    """Return two-sided p-values of errors (…, n) against m runs with `mean` and `std` (…).

    n > 1: Welch's t-test. n = 1: Student's t for a prediction, with the interval mean ± t · std ·
    sqrt(1 + 1/m). A std of 0 only shows that errors are counted in images: it counts as one
    image, which is `image` points. Among groups from one distribution, Welch's test calls
    at most 7 % different if m is at most 5, but 10 % for two runs against ten.
    """
    errors = np.asarray(errors, dtype=np.float64)
    n, s = errors.shape[-1], _std_or_image(std, image)
    difference = errors.mean(-1) - np.asarray(mean)
    theirs = s**2 / m
    if n == 1:  # a single run is assumed to have their variance
        variance, freedom = s**2 + theirs, m - 1.0
    else:
        ours = _std_or_image(errors.std(-1, ddof=1), image) ** 2 / n
        variance = ours + theirs
        freedom = variance**2 / (ours**2 / (n - 1) + theirs**2 / (m - 1))  # Welch-Satterthwaite
    return 2 * special.stdtr(freedom, -np.abs(difference) / np.sqrt(variance))


def _std_or_image(std: ArrayLike, image: float) -> NDArray[np.float64]:
    return np.where(np.asarray(std) < 1e-9, image, std)  # equal errors give 0 up to rounding


def holm(p: Sequence[float]) -> list[float]:
    """Return adjusted p-values in the given order (Holm 1979): reject those at most the level."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min((len(p) - rank) * p[i], 1.0))
        adjusted[i] = largest
    return adjusted


def _verdict(group: Group, p: float, adjusted: float, rows: int) -> Verdict:
    n, image = len(group.errors), image_points(group)
    expected, std, runs = _expected(group)
    kind = "within"
    if adjusted <= LEVEL:
        kind = "lower" if (group.difference or 0) < 0 else "higher"
    test = "Welch's t-test, " if n > 1 else ""
    basis = f"{test}{n} run{'s' * (n > 1)} against {runs}: p = {p:.2g}"
    if rows > 1:
        basis += f", {adjusted:.2g} by Holm over {rows} rows"
    if n == 1:
        s = float(_std_or_image(std, image))
        reach = special.stdtrit(runs - 1, 1 - LEVEL / 2) * s * math.sqrt(1 + 1 / runs)
        low, high = max(expected - reach, 0), min(expected + reach, 100)
        basis += f"; 95 % prediction interval {low:.2f} to {high:.2f} %"
        basis += "; one run gives a wide interval, which misses small differences"
    if std == 0 or group.std == 0:
        basis += f"; a std of 0 counts as one image, {image:.2g} points"
    return Verdict(kind, basis)
