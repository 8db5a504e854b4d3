"""Halving and doubling, sums by nodes, and straggling: measurements compared with the model.

    python -m benchmarks.all_reduce [--repetitions 5] [--write]
    python -m benchmarks.all_reduce --measured FILE.json      # print its table, measure nothing

Four nodes of two ranks, each rank in a network namespace at its node's bridge, with shaped links;
Gloo. Two parameters are fitted to some of the all-reduces; the rest is predicted. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy.optimize import least_squares

from benchmarks import hosts
from benchmarks.all_reduce_rank import INSIDE
from benchmarks.conditions import benchmark_parser, write_results
from benchmarks.scaling import DELAYED, DELAYED_SPEEDS, ONE_THREAD, SPEEDS, place
from harness.planning.step_time_model import Link, Network, Workload, step_time

NODES, LOCAL_RANKS = 4, 2
NO_LINK = Link(0.0, float("inf"))


@dataclass(frozen=True)
class Fitted:
    """Fitted parameters of every link.

    `latency_s`: of a message, in addition to the delay that was set. `rate`: the achieved share of
    the set bytes/s.
    """

    latency_s: float
    rate: float


def predicted_s(point: dict[str, Any], fitted: Fitted) -> float:
    """Predict a point: the time of an all-reduce, or the wait for the slowest rank."""
    if point["part"] == "straggling":  # no bytes, and no parameters of the network
        spread = point["deviation_s"] / point["compute_s"]  # measured, like the compute itself
        work = Workload(point["compute_s"], 0.0, (), spread)
        return step_time(work, Network(1, NO_LINK, NO_LINK), point["ranks"]).straggling_s
    latency_s = fitted.latency_s + point["delay_ms"] / 1000
    bytes_per_s = fitted.rate * point["mbit_per_s"] * 1e6 / 8
    local_ranks = point["local_ranks"]
    network = Network(
        local_ranks,
        inside=Link(latency_s, INSIDE * bytes_per_s),
        between=Link(latency_s, bytes_per_s),
        algorithm="halving_doubling",
    )
    return network.all_reduce_s(point["bytes"], point["nodes"] * local_ranks)


def measured_s(point: dict[str, Any]) -> float:
    """Return the median of a point's repetitions."""
    key = "straggling_s" if point["part"] == "straggling" else "all_reduce_s"
    return float(point[key]["median"])


def is_fitted(point: dict[str, Any]) -> bool:
    """Return True for the points to fit: halving on 2 and 4 hosts, every other speed, no delay."""
    return (
        point["part"] == "halving"
        and point["nodes"] in (2, NODES)
        and point["mbit_per_s"] in SPEEDS[::2]
        and not point["delay_ms"]
    )


def fit(points: Sequence[dict[str, Any]]) -> Fitted:
    """Find the parameters with the least relative errors.

    Errors count squared up to 2 % and linearly above, so a point that other work has disturbed does
    not distort the fit.
    """

    def errors(parameters: Sequence[float]) -> list[float]:
        return [predicted_s(point, Fitted(*parameters)) / measured_s(point) - 1 for point in points]

    found = least_squares(
        errors,
        loss="soft_l1",
        f_scale=0.02,
        x0=[1e-3, 0.9],
        bounds=([0, 0.3], [0.1, 1.1]),
        x_scale=[1e-3, 0.1],
    )
    return Fitted(*map(float, found.x))


def judge(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the fit, each point's prediction and error, and each part's median held-out error."""
    fitted = fit([point for point in points if is_fitted(point)])
    rows, errors = [], dict[str, list[float]]()
    for point in points:
        measured, predicted = measured_s(point), predicted_s(point, fitted)
        part, error_percent = part_of(point), 100 * (predicted / measured - 1)
        if held_out := not is_fitted(point):
            errors.setdefault(part, []).append(abs(error_percent))
        rows.append(
            {
                "part": part,
                "case": case(point),
                "held_out": held_out,
                "measured_s": measured,
                "predicted_s": predicted,
                "error_percent": error_percent,
            }
        )
    return {
        "fitted": asdict(fitted),
        "predictions": rows,
        "median_error_percent": {part: statistics.median(of) for part, of in errors.items()},
    }


def part_of(point: dict[str, Any]) -> str:
    """Return the part of the model that a point tests; delayed all-reduces are a separate part."""
    return point["part"] + ", delayed" * bool(point.get("delay_ms"))


def case(point: dict[str, Any]) -> str:
    """Describe where a point was measured."""
    if point["part"] == "straggling":
        return f"{point['ranks']} ranks, spread {100 * point['set_spread']:g} %"
    ranks = f"{point['nodes']} hosts"
    if point["part"] == "nodes":
        ranks = f"{point['nodes']} nodes of {point['local_ranks']}"
    kib, delay = f"{point['bytes'] / 1024:g} KiB", f", {point['delay_ms']:g} ms"
    return f"{ranks}, {kib}, {point['mbit_per_s']:g} Mbit/s" + delay * bool(point["delay_ms"])


def print_errors(judged: dict[str, Any], points: Sequence[dict[str, Any]]) -> None:
    """Print a row for each point, with the model's prediction and its error."""
    print(
        "part               where                                ms (quartiles)  predicted  error"
    )
    for row, point in zip(judged["predictions"], points, strict=True):
        times = point.get("all_reduce_s") or point["straggling_s"]
        quartiles = f"({1e3 * times['quartile_1']:.2f}, {1e3 * times['quartile_3']:.2f})"
        print(
            f"{row['part']:17}  {row['case']:32} {1e3 * row['measured_s']:8.2f} {quartiles:18} "
            f"{1e3 * row['predicted_s']:8.2f} {row['error_percent']:+6.1f} %"
            + ("" if row["held_out"] else "  fitted")
        )
    fitted = judged["fitted"]
    print(f"fitted: {1e3 * fitted['latency_s']:.2f} ms per message, rate {fitted['rate']:.3f}")
    for part, error in judged["median_error_percent"].items():
        print(f"median error of the held-out points, {part}: {error:.1f} %")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the points of four nodes, then of four hosts whose links have a delay.

    Raises RuntimeError if a rank fails.
    """
    load_average = os.getloadavg()[0]
    points = measure_hosts(options, LOCAL_RANKS, SPEEDS, 0.0)
    points += measure_hosts(options, 1, DELAYED_SPEEDS, DELAYED)
    return {"load_average": load_average, "points": points}


def measure_hosts(
    options: argparse.Namespace, local_ranks: int, speeds: Sequence[float], delay_ms: float
) -> list[dict[str, Any]]:
    """Run one rank per host; straggling is measured on hosts without a delay."""
    world_size = NODES * local_ranks
    with (
        tempfile.TemporaryDirectory() as folder,
        hosts.Hosts(world_size, delay_ms, 0 if delay_ms else local_ranks) as network,
    ):
        out = Path(folder) / "points.json"
        command = [sys.executable, "-m", "benchmarks.all_reduce_rank", "--out", str(out)]
        command += ["--local-ranks", str(local_ranks), "--repetitions", str(options.repetitions)]
        command += ["--mbit-per-s", *map(str, speeds), "--delay-ms", str(delay_ms)]
        for name, links in (("inside", network.inside), ("between", network.between)):
            command += [f"--{name}", *(f"{link.namespace}:{link.name}" for link in links)]
        command += [] if delay_ms else ["--straggling"]
        ranks = [
            network.start(rank, command, ONE_THREAD | place(network, rank, world_size))
            for rank in range(world_size)
        ]
        if any(codes := [rank.wait() for rank in ranks]):
            raise RuntimeError(f"hosts: exit codes {codes}")
        return list(json.loads(out.read_text()))


def main() -> None:
    """Print the table; --write stores it in benchmarks/results/all_reduce.json."""
    parser = benchmark_parser(__doc__, repetitions=5)
    parser.add_argument("--measured", type=Path, metavar="FILE.json", help="measure nothing")
    options = parser.parse_args()
    if options.measured:
        found = json.loads(options.measured.read_text())
    elif reason := hosts.missing():
        parser.error(f"no hosts: {reason}")
    else:
        found = measure(options)
    found["model"] = judge(found["points"])
    print_errors(found["model"], found["points"])
    if options.write:
        print(write_results("all_reduce", found, options.write))


if __name__ == "__main__":
    main()
