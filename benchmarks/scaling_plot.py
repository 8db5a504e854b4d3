"""Plots of scaling.py's measurements, like the paper's figures 7 and 8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Point = dict[str, Any]


def draw(found: dict[str, Any], path: Path) -> Path:
    """Draw an SVG: seconds per step and images/s over ranks; below, hosts with the model."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # equal figures give equal files
    from matplotlib import pyplot

    rows = 2 if "hosts" in found else 1
    figure, axes = pyplot.subplots(rows, 2, figsize=(9, 3.5 * rows), squeeze=False)
    for scaling in ("weak", "strong"):
        points = [point for point in found["points"] if point["scaling"] == scaling]
        _bars(axes[0][0], points, f"{scaling} scaling")
        _curve(axes[0][1], points, f"{scaling} scaling", lambda p: p["images_per_s"])
    _ideal(axes[0][1], found["points"])
    _label(axes[0][0], "ranks", "s a step")
    _label(axes[0][1], "ranks", "images/s")
    for axis in axes[0]:
        axis.set_ylim(bottom=0)
    if rows == 2:
        _draw_hosts(axes[1], found)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def _draw_hosts(axes: Any, found: dict[str, Any]) -> None:
    plain = [point for point in found["hosts"] if not point["delay_ms"]]
    model = [row for row in found["model"]["predictions"] if not row["delay_ms"]]
    for speed in sorted({point["mbit_per_s"] for point in plain}):
        points = [point for point in plain if point["mbit_per_s"] == speed]
        rows = [row for row in model if row["mbit_per_s"] == speed]
        alone = [point["alone_s"]["median"] for point in points]
        ranks = [point["ranks"] for point in points]
        colour = _bars(axes[0], points, f"{speed:g} Mbit/s")
        predicted = [row["predicted_step_s"] for row in rows]
        axes[0].plot(ranks, predicted, "--", color=colour)
        shares = [a / point["step_s"]["median"] for a, point in zip(alone, points, strict=True)]
        axes[1].plot(ranks, shares, "o-", color=colour, label=f"{speed:g} Mbit/s")
        axes[1].plot(
            ranks, [a / p for a, p in zip(alone, predicted, strict=True)], "--", color=colour
        )
    axes[0].set_yscale("log")
    axes[0].set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    axes[0].set_ylim(top=8)  # leaves space for the legend above the curves
    axes[1].set_ylim(0, 1.4)
    axes[1].set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    _label(axes[0], "hosts (dashed: the model)", "s a step, compute a timed wait", columns=3)
    _label(axes[1], "hosts (dashed: the model)", "efficiency", columns=3)


def _bars(axis: Any, points: Sequence[Point], label: str) -> Any:
    """Plot medians with quartiles; return the line's colour."""
    middle = [point["step_s"]["median"] for point in points]
    low = [point["step_s"]["median"] - point["step_s"]["quartile_1"] for point in points]
    high = [point["step_s"]["quartile_3"] - point["step_s"]["median"] for point in points]
    ranks = [point["ranks"] for point in points]
    drawn = axis.errorbar(ranks, middle, [low, high], fmt="o-", capsize=3, label=label)
    return drawn.lines[0].get_color()


def _curve(axis: Any, points: Sequence[Point], label: str, value: Callable[[Point], float]) -> None:
    axis.plot([point["ranks"] for point in points], [value(p) for p in points], "o-", label=label)


def _ideal(axis: Any, points: Sequence[Point]) -> None:
    """Plot one rank's images/s times the ranks (weak scaling)."""
    weak = [point for point in points if point["scaling"] == "weak"]
    one = next(point["images_per_s"] for point in weak if point["ranks"] == 1)
    ranks = [point["ranks"] for point in weak]
    axis.plot(ranks, [one * count for count in ranks], ":", color="grey", label="ideal")


def _label(axis: Any, x: str, y: str, columns: int = 1) -> None:
    ranks = sorted({round(tick) for line in axis.get_lines() for tick in line.get_xdata()})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [str(rank) for rank in ranks])
    axis.minorticks_off()
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.legend(fontsize="small", ncols=columns, loc="upper left" if columns > 1 else "best")
