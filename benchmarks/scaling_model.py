"""The step-time model, fitted to some of the measured points and compared with the rest."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.optimize import least_squares

from benchmarks.scaling_rank import BUCKET_BYTES, GRADIENT_BYTES, LAYERS
from harness.planning.step_time_model import Layer, Link, Network, Workload, fill_buckets, step_time

BACKWARD_SHARE = 2 / 3  # share of a step's wait
BUCKETS = tuple(
    fill_buckets([Layer(GRADIENT_BYTES // LAYERS, 1 / LAYERS)] * LAYERS, BUCKET_BYTES, BUCKET_BYTES)
)
GLOO_SEGMENTS = 2  # per step of its ring, for buckets of this size
NO_LINK = Link(0.0, float("inf"))


@dataclass(frozen=True)
class Fitted:
    """Fitted parameters.

    `latency_s`: of a ring's step, in addition to the delay that was set. `rate`: the achieved share
    of a link's set bytes/s. `overhead_s`: of an all-reduce.
    """

    latency_s: float
    rate: float
    overhead_s: float


def predicted_step_s(point: dict[str, Any], fitted: Fitted) -> float:
    """Predict the step of a point from its number of ranks, its link and its measured wait."""
    link = Link(
        fitted.latency_s + point["delay_ms"] / 1000,
        fitted.rate * point["mbit_per_s"] * 1e6 / 8,
    )
    network = Network(1, NO_LINK, link, fitted.overhead_s, "ring", GLOO_SEGMENTS)
    compute_s = point["alone_s"]["median"]
    work = Workload(compute_s, BACKWARD_SHARE * compute_s, BUCKETS)
    return step_time(work, network, point["ranks"]).step_s


def is_fitted(point: dict[str, Any], points: Sequence[dict[str, Any]]) -> bool:
    """Return True for the points to fit: fewest and most hosts, every other speed, no delay."""
    speeds = sorted({other["mbit_per_s"] for other in points})
    ends = {extreme(other["ranks"] for other in points) for extreme in (min, max)}
    return point["ranks"] in ends and point["mbit_per_s"] in speeds[::2] and not point["delay_ms"]


def fit(points: Sequence[dict[str, Any]]) -> Fitted:
    """Find the parameters with the least errors relative to the steps.

    Errors count squared up to 2 % and linearly above, so a point that other work has disturbed does
    not distort the fit.
    """

    def errors(parameters: Sequence[float]) -> list[float]:
        fitted = Fitted(*parameters)
        return [predicted_step_s(p, fitted) / p["step_s"]["median"] - 1 for p in points]

    found = least_squares(
        errors,
        loss="soft_l1",
        f_scale=0.02,
        x0=[1e-3, 0.9, 1e-3],
        bounds=([0, 0.3, 0], [0.1, 1.1, 0.1]),
        x_scale=[1e-3, 0.1, 1e-3],
    )
    return Fitted(*map(float, found.x))


def judge(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the fit, each point's prediction and error, and the median held-out error."""
    fitted = fit([point for point in points if is_fitted(point, points)])
    rows = []
    for point in points:
        measured_s, predicted_s = point["step_s"]["median"], predicted_step_s(point, fitted)
        exposed_s = measured_s - point["alone_s"]["median"]
        rows.append(
            {
                **{key: point[key] for key in ("ranks", "mbit_per_s", "delay_ms")},
                "held_out": not is_fitted(point, points),
                "measured_step_s": measured_s,
                "predicted_step_s": predicted_s,
                "error_percent": 100 * (predicted_s / measured_s - 1),
                "measured_exposed_s": exposed_s,
                "predicted_exposed_s": predicted_s - point["alone_s"]["median"],
            }
        )
    return {
        "fitted": asdict(fitted),
        "predictions": rows,
        "median_error_percent": _median_error(rows, "step"),
        "median_exposed_error_percent": _median_error(rows, "exposed"),
    }


def _median_error(rows: Sequence[dict[str, Any]], part: str) -> float:
    return statistics.median(
        100 * abs(row[f"predicted_{part}_s"] / row[f"measured_{part}_s"] - 1)
        for row in rows
        if row["held_out"]
    )
