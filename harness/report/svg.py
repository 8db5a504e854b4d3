"""Figures: their data, drawn as SVG and written as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from markupsafe import Markup

WIDTH, HEIGHT = 520, 330
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 30, 44  # margins around the plot
FEW = 12  # points; on lines with at most this many, each is marked
MANY = 24  # series; above this number they are drawn thinner
COLOURS = 8  # in figure.css; further series repeat them, dashed
CHARACTER = 6.4  # mean width of a legend's character
STYLE = Markup((Path(__file__).parent / "figure.css").read_text(encoding="utf-8"))

Scale = Literal["linear", "log2", "log10"]


@dataclass(frozen=True)
class Axis:
    """An axis. `low` and `high` are taken from the data where they are None."""

    label: str
    unit: str = ""
    scale: Scale = "linear"
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Named points. `runs` are the numbers of the runs shown, whose switches hide the series."""

    name: str
    legend: str
    runs: tuple[int, ...]
    colour: int | None  # None: the colour of text
    shape: Literal["line", "dashes", "dot", "small", "diamond"]
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()  # lower ends of the error bars
    high: tuple[float, ...] = ()  # and their upper ends
    hover: tuple[str, ...] = ()  # hover text of each point, instead of its values


@dataclass(frozen=True)
class Figure:
    """One pair of axes. `name` is its file name in --assets; `legend`: it has its own legend."""

    name: str
    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    legend: bool = False

    @property
    def description(self) -> str:
        """The alternative text: axes and last values in words."""
        last: dict[str, list[float]] = {}
        for series in self.series:
            if series.y and series.legend and series.shape != "small":
                last.setdefault(series.legend, []).append(series.y[-1])
        ends = "; ".join(
            f"{name} {sum(values) / len(values):.4g}" for name, values in [*last.items()][:20]
        )
        unit = f" in {self.y.unit}" if self.y.unit else ""
        return f"{self.y.label}{unit} against {self.x.label}. Last values: {ends}."


@dataclass(frozen=True)
class Ruler:
    """The mapping of an axis onto the pixels from `start` to `end`."""

    scale: Scale
    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        low, high, value = (
            v if self.scale == "linear" else math.log(v) for v in (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def rulers(figure: Figure) -> tuple[Ruler, Ruler]:
    """Return the rulers of the x and the y axis."""
    xs = [x for s in figure.series for x in s.x]
    ys = [y for s in figure.series for y in (*s.y, *s.low, *s.high)]
    x = _ruler(figure.x, xs, LEFT, WIDTH - RIGHT, 6, tight=True)
    return x, _ruler(figure.y, ys, HEIGHT - BOTTOM, TOP, 5, tight=False)


def _ruler(
    axis: Axis, values: Sequence[float], start: float, end: float, count: int, tight: bool
) -> Ruler:
    if axis.scale != "linear":
        values = [v for v in values if v > 0] or [1.0]
    values = values or [0.0]
    low = min(values) if axis.low is None else axis.low
    high = max(values) if axis.high is None else axis.high
    if axis.scale == "linear":
        if high - low < 1e-12:
            low, high = (0.0, high * 1.2) if high > 0 else (low - 0.5, low + 0.5)
        step = _nice_step((high - low) / count)
        if not tight:
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        first = math.ceil(low / step - 1e-9)
        ticks = [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
    else:
        ticks = _log_ticks(low, high, 2 if axis.scale == "log2" else 10)
        if axis.scale == "log2":
            low, high = low / 1.25, high * 1.25  # a margin beside the outer points
        else:
            low, high = min(low, ticks[0]), max(high, ticks[-1])
    return Ruler(axis.scale, low, high, start, end, tuple(ticks))


def _nice_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * (1 - 1e-9))


def _log_ticks(low: float, high: float, base: int) -> list[float]:
    first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
    if base == 2:
        return [2.0**i for i in range(first, last + 1) if low <= 2.0**i <= high] or [low]
    decades = [10.0**i for i in range(first, max(last, first + 1) + 1)]
    if len(decades) > 3:
        return decades
    return [m * d for d in decades for m in (1, 2, 5) if decades[0] <= m * d <= decades[-1]]


def tick_text(value: float, scale: Scale) -> str:
    """Format a tick such as 0.25, 90 or 1.5k; powers of two as in the paper, 8192 as 8k."""
    if scale == "log2" and value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:.0f}k"
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 10000 or (abs(value) >= 1000 and scale != "log2"):
        return f"{value / 1000:g}k"
    return f"{value:.6g}".replace("e-0", "e-")


def draw(figure: Figure, standalone: bool = False) -> Markup:
    """Draw the figure as an SVG element; `standalone` adds title, legend and style for a file."""
    x, y = rulers(figure)
    series = Markup("\n").join(_series(s, x, y) for s in figure.series)
    own = standalone or figure.legend
    legend, height = _legend(figure) if own else (Markup(""), HEIGHT)
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" class="plot{many}" role="img" tabindex="0" '
        'viewBox="0 0 {width} {height}" data-figure="{name}" aria-label="{title}. {description}">\n'
        "{head}{axes}\n{series}\n{legend}</svg>"
    ).format(
        width=WIDTH,
        height=height,
        name=figure.name,
        many=" many" * (len(figure.series) > MANY),
        title=figure.title,
        description=figure.description,
        head=_head(figure, height) if standalone else "",
        axes=_axes(figure, x, y),
        series=series,
        legend=legend,
    )


def _head(figure: Figure, height: float) -> Markup:
    return Markup(
        "<title>{}</title><desc>{}</desc><style>{}</style>"
        '<rect class="paper" width="{}" height="{}"/>\n'
    ).format(figure.title, figure.description, STYLE, WIDTH, height)


def _axes(figure: Figure, x: Ruler, y: Ruler) -> Markup:
    parts = []
    for value in y.ticks:
        at = round(y(value), 1)
        text = tick_text(value, y.scale)
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                '<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
            ).format(LEFT, WIDTH - RIGHT, at, at, LEFT - 7, at + 4, text)
        )
    for value in x.ticks:
        at = round(x(value), 1)
        text, below = tick_text(value, x.scale), HEIGHT - BOTTOM
        parts.append(
            Markup(
                '<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                '<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>'
            ).format(at, at, below, below + 4, at, below + 17, text)
        )
    unit = f", {figure.y.unit}" if figure.y.unit else ""
    parts.append(
        Markup(
            '<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>'
            '<text class="name" x="4" y="14">{}{}</text>'
            '<text class="name" x="{}" y="{}" text-anchor="end">{}</text>'
        ).format(
            LEFT,
            WIDTH - RIGHT,
            HEIGHT - BOTTOM,
            HEIGHT - BOTTOM,
            figure.y.label,
            unit,
            WIDTH - RIGHT,
            HEIGHT - 8,
            figure.x.label,
        )
    )
    return Markup("").join(parts)


def css_classes(colour: int | None) -> str:
    """Return the CSS classes of a colour number."""
    if colour is None:
        return "plain"
    return f"c{colour % COLOURS}" + (f" again{min(colour // COLOURS, 3)}" * (colour >= COLOURS))


def _series(series: Series, x: Ruler, y: Ruler) -> Markup:
    points = [(round(x(a), 1), round(y(b), 1)) for a, b in zip(series.x, series.y, strict=True)]
    if series.shape in ("line", "dashes"):
        body = Markup('<polyline class="{}" points="{}"/>').format(
            series.shape, " ".join(f"{a:g},{b:g}" for a, b in points)
        )
        if series.shape == "line" and len(points) <= FEW:
            body += Markup("").join(_marker("small", *point) for point in points)
    else:
        body = Markup("").join(_marker(series.shape, *point) for point in points)
    for value, low, high in zip(series.x, series.low, series.high, strict=False):
        if high > low:
            body = (
                Markup('<line class="bar" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                    *[round(v, 1) for v in (x(value), x(value), y(low), y(high))]
                )
                + body
            )
    return Markup('<g class="series {}" data-runs="{}">{}</g>').format(
        css_classes(series.colour), " ".join(map(str, series.runs)), body
    )


def _marker(shape: str, x: float, y: float) -> Markup:
    if shape == "diamond":
        return Markup('<path class="diamond" d="M{} {}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"/>').format(
            x, round(y - 5.5, 1)
        )
    return Markup('<circle class="{}" cx="{}" cy="{}" r="{}"/>').format(
        shape, x, y, 4 if shape == "dot" else 2
    )


def _legend(figure: Figure) -> tuple[Markup, float]:
    entries: dict[tuple[str, str], Series] = {}
    for series in figure.series:
        if series.legend and series.shape != "small":
            entries.setdefault((series.legend, series.shape), series)
    x, y, parts = float(LEFT), HEIGHT + 12.0, []
    for (name, shape), series in entries.items():
        width = 30 + CHARACTER * len(name)
        if x > LEFT and x + width > WIDTH - RIGHT:
            x, y = float(LEFT), y + 19
        line = Markup('<polyline class="{}" points="{},{} {},{}"/>').format(
            "line" if shape == "line" else "dashes", x, y - 4, x + 16, y - 4
        )
        swatch = line if shape in ("line", "dashes") else _marker(shape, x + 8, y - 4)
        parts.append(
            Markup('<g class="{}">{}<text class="name" x="{}" y="{}">{}</text></g>').format(
                css_classes(series.colour), swatch, x + 22, y, name
            )
        )
        x += width
    return Markup("").join(parts), y + 14


def plot_data(figure: Figure) -> dict[str, object]:
    """Return what the page's script needs to show a figure's values, in the order of its series."""
    x, y = rulers(figure)

    def axis(ruler: Ruler, of: Axis) -> dict[str, object]:
        keys = ("scale", "low", "high", "start", "end")
        return {key: getattr(ruler, key) for key in keys} | {"label": of.label, "unit": of.unit}

    return {
        "x": axis(x, figure.x),
        "y": axis(y, figure.y),
        "series": [
            {"name": s.name, "x": _rounded(s.x), "y": _rounded(s.y)}
            | ({"hover": s.hover} if s.hover else {})
            for s in figure.series
        ],
    }


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def csv_text(figure: Figure) -> str:
    """Write the points as CSV: name, x, y and, where it has one, the ends of the error bar."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    unit = f" ({figure.y.unit})" if figure.y.unit else ""
    writer.writerow(["series", figure.x.label, figure.y.label + unit, "low", "high"])
    for s in figure.series:
        lows, highs = (ends or ("",) * len(s.x) for ends in (s.low, s.high))
        rows = zip(s.x, s.y, lows, highs, strict=True)
        writer.writerows([s.name, *row] for row in rows)
    return text.getvalue()
