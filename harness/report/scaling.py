"""Scaling results, as benchmarks/scaling.py writes them: the paper's figures 7 and 8."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError
from harness.report.figures import Section, columns
from harness.report.runs import JsonObject
from harness.report.svg import Axis, Figure, Series

RANKS = Axis("ranks", scale="log2")
HOSTS = Axis("hosts", scale="log2")
Point = JsonObject


@dataclass(frozen=True)
class Scaling:
    """Scaling results.

    `points`: one network on 1, 2, … ranks. `hosts`: the same over links of set speed, where
    computing is a timed wait. `predictions`: the step-time model's value for each point of `hosts`.
    """

    points: list[Point]
    hosts: list[Point]
    predictions: list[Point]
    conditions: str


def read_scaling(path: Path) -> Scaling:
    """Read scaling results; raise UserError if the file holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        points, hosts = found["points"], found.get("hosts", [])
        predictions = found.get("model", {}).get("predictions", [])
        for point in points:
            _ = point["scaling"], point["ranks"], point["images_per_s"], point["efficiency"]
        for point in hosts:
            _ = point["ranks"], point["mbit_per_s"], point["delay_ms"], point["alone_s"]["median"]
        for point in [*points, *hosts]:
            _ = [point["step_s"][key] for key in ("median", "quartile_1", "quartile_3")]
        names = ("gpu", "cpu", "cores", "torch", "commit", "date")
        conditions = ", ".join(f"{name} {found[name]}" for name in names if found.get(name))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: no scaling results in it ({error!r}); give a file that "
            "`python -m benchmarks.scaling --write` has written"
        ) from None
    return Scaling(points, hosts, predictions, conditions)


def scaling_section(scaling: Scaling) -> Section:
    """Plot step time, images/s and efficiency; and efficiency over hosts, if it was measured."""
    steps, speeds, shares = [], [], []
    for colour, kind in enumerate(dict.fromkeys(point["scaling"] for point in scaling.points)):
        points = [point for point in scaling.points if point["scaling"] == kind]
        name = f"{kind} scaling"
        steps.append(_steps(points, name, colour))
        speeds.append(_line(name, colour, [(p["ranks"], p["images_per_s"]) for p in points]))
        shares.append(_line(name, colour, [(p["ranks"], 100 * p["efficiency"]) for p in points]))
        speeds += _ideal(points, name, colour)
    figures = [
        _figure("scaling-step", "Step time", RANKS, Axis("step time", "ms", low=0), steps),
        _figure("scaling-images", "Throughput", RANKS, Axis("images per second", low=0), speeds),
        _figure("scaling-efficiency", "Efficiency", RANKS, Axis("efficiency", "%", low=0), shares),
    ]
    if scaling.hosts:
        figures.append(_hosts(scaling))
    note = (
        "Medians; bars are quartiles. Weak scaling: the same images per rank; strong: the same "
        "minibatch. Efficiency: images per second and rank, relative to a single rank. "
        f"Measured with: {scaling.conditions}. The paper's figures 7 and 8."
    )
    if scaling.hosts:
        note += " Hosts: computing is a timed wait, link speeds are set; dashed: the model."
    return Section("Scaling", note, tuple(figures))


def _figure(name: str, title: str, x: Axis, y: Axis, series: Sequence[Series]) -> Figure:
    return Figure(name, title, x, y, tuple(series), legend=True)


def _line(name: str, colour: int, points: Sequence[tuple[float, float]]) -> Series:
    return Series(name, name, (), colour, "line", *columns(points))


def _steps(points: Sequence[Point], name: str, colour: int) -> Series:
    """Plot milliseconds per step, with quartiles."""
    line = _line(name, colour, [(p["ranks"], 1e3 * p["step_s"]["median"]) for p in points])
    low, high = (
        tuple(1e3 * p["step_s"][quartile] for p in points)
        for quartile in ("quartile_1", "quartile_3")
    )
    return Series(*(line.name, line.legend, (), colour, "line", line.x, line.y), low, high)


def _ideal(points: Sequence[Point], name: str, colour: int) -> Iterator[Series]:
    """Plot one rank's images/s times the number of ranks."""
    for one in points:
        if one["ranks"] == 1:
            ideal = [(p["ranks"], one["images_per_s"] * p["ranks"]) for p in points]
            legend = f"{name}, ideal"
            yield Series(legend, legend, (), colour, "dashes", *columns(ideal))


def _hosts(scaling: Scaling) -> Figure:
    """Plot the efficiency over hosts, one line per link."""
    series = []
    links = dict.fromkeys((point["mbit_per_s"], point["delay_ms"]) for point in scaling.hosts)
    for colour, link in enumerate(links):
        points = [p for p in scaling.hosts if (p["mbit_per_s"], p["delay_ms"]) == link]
        alone = {p["ranks"]: 100 * p["alone_s"]["median"] for p in points}
        name = f"{link[0]:g} Mbit/s" + (f", {link[1]:g} ms" if link[1] else "")
        shares = [(p["ranks"], alone[p["ranks"]] / p["step_s"]["median"]) for p in points]
        model = [
            (p["ranks"], alone[p["ranks"]] / p["predicted_step_s"])
            for p in scaling.predictions
            if (p["mbit_per_s"], p["delay_ms"]) == link and p["ranks"] in alone
        ]
        series.append(_line(name, colour, shares))
        series.append(Series(f"{name}, model", "", (), colour, "dashes", *columns(model)))
    axis = Axis("efficiency", "%", low=0)
    return _figure("scaling-hosts", "Efficiency over hosts", HOSTS, axis, series)
