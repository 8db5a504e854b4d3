"""The page: page.html filled with groups, figures and tables."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness import __version__
from harness.outcome import State
from harness.planning.noise_forecast import first_milestone, measured_norms, run_noise_scale
from harness.report.events import Event, duration, run_events, state_name
from harness.report.figures import Section, measured, run_name
from harness.report.groups import Group, flat_config
from harness.report.runs import RecordedRun
from harness.report.svg import STYLE, css_classes, draw, plot_data
from harness.report.verdicts import Verdict, verdicts

HERE = Path(__file__).parent
NAMED_AT_MOST = 6  # runs in a table's cell
UNMARKED = ("seed", "command")  # differ from run to run anyway
VERDICTS = {
    "within": "no difference shown",
    "lower": "lower than expected",
    "higher": "higher than expected",
    "": "",
}
TRACK = 130  # px, the width of a row's graphic


@dataclass(frozen=True)
class Value:
    """One value of a key, and the runs that have it ("" if all have)."""

    text: str
    whose: str


@dataclass(frozen=True)
class Row:
    """A key of the config or the environment, with its values."""

    key: str
    values: tuple[Value, ...]
    marked: bool  # it differs between runs in a way that matters


def render(title: str, groups: Sequence[Group], found: Sequence[Section]) -> str:
    """Render the page as HTML; text from configs, paths and logs is escaped."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(css_classes=css_classes, draw=draw, name=run_name, duration=duration)
    runs, found_verdicts = _in_order(groups), verdicts(groups)
    config = table({n: flat_config(run.config) for n, _, run in runs}, groups)
    machine = table({n: flat_environment(run) for n, _, run in runs}, groups)
    return environment.get_template("page.html").render(
        title=title,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=__version__,
        states=_states([run for _, _, run in runs]),
        groups=groups,
        answers=[
            answer(group, verdict, groups)
            for group, verdict in zip(groups, found_verdicts, strict=True)
        ],
        scale=_scale(groups),
        sections=found,
        runs=[run_row(number, group, run) for number, group, run in runs],
        summary=summary(found_verdicts),
        source=_distinct([_source(group) for group in groups]),
        happened=_happened(groups),
        differing=[row for row in (*config, *machine) if row.marked],
        config=config,
        machine=machine,
        plots=_as_json({f.name: plot_data(f) for section in found for f in section.figures}),
        style=STYLE + Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
    )


def _in_order(groups: Sequence[Group]) -> list[tuple[int, Group, RecordedRun]]:
    return [(n, g, run) for g in groups for n, run in zip(g.numbers, g.runs, strict=True)]


def _happened(groups: Sequence[Group]) -> list[tuple[str, list[Event]]]:
    """Return (runs, events) for each distinct list of events; runs without events are omitted."""
    numbers: dict[str, list[int]] = {}
    events: dict[str, list[Event]] = {}
    for number, _, run in _in_order(groups):
        if found := run_events(run):
            events[repr(found)] = found
            numbers.setdefault(repr(found), []).append(number)
    return [(_named(same, groups), events[key]) for key, same in numbers.items()]


def summary(found: Sequence[Verdict]) -> str:
    """Summarize the verdicts in a sentence."""
    kinds = [verdict.kind for verdict in found if verdict.kind]
    if not kinds:
        return "No error can be tested against an expected one."
    parts = [f"{kinds.count('within')} of {len(found)} show no difference from what is expected"]
    parts += [f"{kinds.count(k)} {k}" for k in ("lower", "higher") if k in kinds]
    if untested := len(found) - len(kinds):
        parts.append(f"{untested} not tested")
    return ", ".join(parts) + "."


def _as_json(value: object) -> Markup:
    """Encode as JSON that cannot close the script element around it."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c"))


def _states(runs: Sequence[RecordedRun]) -> str:
    states = [state_name(run.state) for run in runs]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def answer(group: Group, verdict: Verdict, groups: Sequence[Group]) -> dict[str, object]:
    """Return a row of the table at the top, as text."""
    recipe, runs = group.config.recipe, group.runs
    speeds = [run.images_per_s for run in runs if run.images_per_s]
    walls = [run.wall_s for run in runs if run.state is State.FINISHED]
    difference = group.difference
    return {
        "group": group,
        "error": "–" if group.mean is None else measured(group.mean, group.std),
        "runs": f"{len(group.errors)} of {len(runs)}",
        "rule": group.rule,
        "expected": _expected(group),
        "source": _source(group),
        "difference": "–" if difference is None else f"{difference:+.2f}".replace("-", "−"),
        "verdict": VERDICTS[verdict.kind],
        "kind": verdict.kind,
        "basis": verdict.basis,
        "picture": _picture(group, groups),
        "minibatch": f"{recipe.minibatch:,}",
        "workers": f"{group.config.workers:,} × {recipe.worker_batch}",
        "ranks": _distinct([" → ".join(map(str, run.world_sizes)) for run in runs]),
        "hardware": _distinct([run.hardware for run in runs]),
        "wall": duration(sum(walls) / len(walls)) if walls else "–",
        "speed": f"{sum(speeds) / len(speeds):,.0f}" if speeds else "–",
    }


def _expected(group: Group) -> str:
    return measured(group.expect.error, group.expect.std) if group.expect else "–"


def _source(group: Group) -> str:
    """Return the source of the expected error, with its number of runs."""
    if group.expect is None:
        return ""
    runs = group.expect.runs
    return group.expect.source + (f", {runs} run{'s' * (runs > 1)}" if runs else "")


def _distinct(texts: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(text for text in texts if text)) or "–"


def _scale(groups: Sequence[Group]) -> tuple[float, float]:
    """Return the smallest and the largest error that the rows' graphics show."""
    ends = [end for group in groups for end in _ends(group)] or [0.0, 100.0]
    return min(ends), max(ends)


def _ends(group: Group) -> list[float]:
    pairs = [] if group.mean is None else [(group.mean, group.std)]
    pairs += [(group.expect.error, group.expect.std)] if group.expect else []
    return [e + sign * (std or 0) for e, std in pairs for sign in (-1, 1)] + group.errors


def _picture(group: Group, groups: Sequence[Group]) -> dict[str, object]:
    """Return the pixels of a row's graphic: the expected error as a band, the seeds as points."""
    low, high = _scale(groups)

    def at(error: float) -> float:
        return round(6 + (error - low) / ((high - low) or 1) * (TRACK - 12), 1)

    std, band = group.std or 0.0, None
    if group.expect is not None:
        expected, spread = group.expect.error, group.expect.std or 0.0
        start, end = at(expected - spread), at(expected + spread)
        band = {"start": start - 1, "width": round(end - start + 2, 1), "expected": at(expected)}
    return {
        "width": TRACK,
        "band": band,
        "points": [at(error) for error in group.errors],
        "mean": None if group.mean is None else at(group.mean),
        "bar": None if group.mean is None else (at(group.mean - std), at(group.mean + std)),
    }


def run_row(number: int, group: Group, run: RecordedRun) -> dict[str, object]:
    """Return a row of the table of runs."""
    last = run.evaluations[-1] if run.evaluations else None
    waits = [epoch.data_wait for epoch in run.epochs]
    return {
        "number": number,
        "name": run_name(group, run),
        "folder": run.folder,
        "state": state_name(run.state),
        "epochs": f"{last.epoch if last else 0} of {run.config.recipe.epochs}",
        "error": "–" if run.error is None else f"{run.error:.2f} %",
        "rule": "" if run.error is None else group.rule,
        "last": f"{last.error:.2f} %" if last else "–",
        "best": f"{min(e.error for e in run.evaluations):.2f} %" if last else "–",
        "top5": f"{last.top5_error:.2f} %" if last else "–",
        "ranks": " → ".join(map(str, run.world_sizes)) or "–",
        "wall": duration(run.wall_s),
        "speed": f"{run.images_per_s:,.0f}" if run.images_per_s else "–",
        "wait": f"{100 * sum(waits) / len(waits):.1f} %" if waits else "–",
    }


def flat_environment(run: RecordedRun) -> dict[str, object]:
    """Flatten environment.json into key -> value."""
    flat: dict[str, object] = {}
    for name, found in run.environment.items():
        if isinstance(found, dict):
            flat |= {f"{name}.{key}": value for key, value in found.items()}
        else:
            flat[name] = shlex.join(map(str, found)) if isinstance(found, list) else found
    if noise := _noise(run):
        flat["gradient noise scale"] = noise
    if digest := run.status.get("weights_sha256"):
        flat["weights"] = f"SHA-256 {str(digest)[:12]}…"
    return flat


def _noise(run: RecordedRun) -> str:
    """Return the gradient noise scale with its standard error, over the steps at the peak rate."""
    epoch = first_milestone(run.config)
    norms = measured_norms(run.events, epoch * run.config.steps_per_epoch)
    if not norms:
        return ""
    scale = run_noise_scale(run.config, norms)
    spread = "" if scale.standard_error is None else f" ± {scale.standard_error:,.0f}"
    return f"{scale.images:,.0f}{spread} images ({len(norms)} steps up to epoch {epoch})"


def table(values: dict[int, dict[str, object]], groups: Sequence[Group]) -> list[Row]:
    """Tabulate `values` (run number -> key -> value); keys that differ between runs are marked."""
    rows = []
    for key in dict.fromkeys(key for flat in values.values() for key in flat):
        whose: dict[str, list[int]] = {}
        for number, flat in values.items():
            text = _text(flat[key]) if key in flat else "–"
            whose.setdefault(text, []).append(number)
        differs = len(whose) > 1
        cells = tuple(
            Value(text, _named(numbers, groups) if differs else "")
            for text, numbers in whose.items()
        )
        rows.append(Row(key, cells, differs and key not in UNMARKED))
    return rows


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _named(numbers: Sequence[int], groups: Sequence[Group]) -> str:
    """Name complete groups by their label and other runs individually."""
    names = []
    for group in groups:
        inside = [number for number in group.numbers if number in numbers]
        if len(inside) == len(group.numbers):
            names.append(group.label)
        else:
            names += [run_name(group, group.runs[group.numbers.index(n)]) for n in inside]
    more = len(names) - NAMED_AT_MOST
    return "; ".join(names[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
