"""Which figures a report has, from the groups of its runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harness.config import Config
from harness.recipe.schedule import lr_at, warmup_steps
from harness.report.groups import Group, sweeps
from harness.report.runs import RecordedRun
from harness.report.svg import Axis, Figure, Series

LR_DOTS = 40  # a run's
CLOSE_UP = 2 / 3  # from here on the end of training is shown close up
EPOCHS = "epochs"


@dataclass(frozen=True)
class Section:
    """Figures under one heading, and what they show, in a sentence or two."""

    title: str
    note: str
    figures: tuple[Figure, ...]


def sections(groups: Sequence[Group]) -> list[Section]:
    """Those that there is something to show in."""
    found = [
        _error_against_minibatch(groups),
        _error_against_epochs(groups),
        _distillation(groups),
        _learning_rate(groups),
        _throughput(groups),
    ]
    filled = [
        Section(s.title, s.note, tuple(f for f in s.figures if any(x.x for x in f.series)))
        for s in found
    ]
    return [section for section in filled if section.figures]


def _each_run(groups: Sequence[Group]) -> Iterator[tuple[Group, RecordedRun, int, int]]:
    """(group, run, its number, the group's colour)"""
    for colour, group in enumerate(groups):
        for run, number in zip(group.runs, group.numbers, strict=True):
            yield group, run, number, colour


def run_name(group: Group, run: RecordedRun) -> str:
    """Such as `gradual, seed 3`."""
    return f"{group.label}, seed {run.config.seed}"


def measured(mean: float, std: float | None) -> str:
    """Such as 23.74 ± 0.09 %."""
    return f"{mean:.2f} %" if std is None else f"{mean:.2f} ± {std:.2f} %"


def _error_against_minibatch(groups: Sequence[Group]) -> Section:
    found = sweeps(groups)
    series: list[Series] = []
    for colour, sweep in enumerate(found):
        name = "measured" if len(found) == 1 else f"{sweep[0].label} … {sweep[-1].label}"
        series += _sweep([group for group in sweep if group.mean is not None], name, colour)
    figure = Figure(
        "error-against-minibatch",
        "Error against minibatch",
        Axis("minibatch kn, images", scale="log2"),
        Axis("validation error", "%"),
        tuple(series),
    )
    note = "Mean over the seeds; bars are ± one standard deviation. The paper's figure 1."
    return Section("Error against minibatch", note, (figure,))


def _sweep(sweep: Sequence[Group], name: str, colour: int) -> Iterator[Series]:
    """The line, and a point of what was expected and one of what was measured for each group."""
    numbers = tuple(number for group in sweep for number in group.numbers)
    x = tuple(float(group.config.recipe.minibatch) for group in sweep)
    y = tuple(group.mean or 0.0 for group in sweep)
    yield Series(f"{name}, line", name, numbers, colour, "line", x, y, told=("",) * len(x))
    for group, kn, mean in zip(sweep, x, y, strict=True):
        expect, runs = group.expect, len(group.errors)
        for kind, error, std, source in (
            ("expected", expect.error, expect.std, expect.source),
            (name, mean, group.std, f"{runs} run{'s' if runs > 1 else ''}"),
        ):
            expected, bar = kind == "expected", std or 0.0
            yield Series(
                f"{group.label}, {kind}",
                kind,
                group.numbers,
                None if expected else colour,
                "diamond" if expected else "dot",
                (kn,),
                (error,),
                (error - bar,),
                (error + bar,),
                (f"kn = {kn:.0f}: {measured(error, std)} ({source})",),
            )


def _error_against_epochs(groups: Sequence[Group]) -> Section:
    training, validation, late = [], [], []
    for group, run, number, colour in _each_run(groups):
        base = run_name(group, run), group.label, (number,), colour, "line"
        points = [(e.position, e.train_error) for e in run.epochs if e.train_error is not None]
        training.append(Series(*base, *_columns(points)))
        points = [(float(e.epoch), e.error) for e in run.evaluations]
        validation.append(Series(*base, *_columns(points)))
        from_epoch = CLOSE_UP * run.config.recipe.epochs
        late.append(Series(*base, *_columns([p for p in points if p[0] >= from_epoch])))
    error = Axis("validation error", "%")
    figures = (
        Figure(
            "training-error",
            "Training error",
            Axis(EPOCHS),
            Axis("training error", "%"),
            tuple(training),
        ),
        Figure("validation-error", "Validation error", Axis(EPOCHS), error, tuple(validation)),
        Figure(
            "validation-error-late",
            "Validation error, the last third",
            Axis(EPOCHS),
            error,
            tuple(late),
        ),
    )
    note = (
        "One line a run. The training error is the mean over an epoch's crops, while the weights "
        "change; the validation error is that of all validation images after the epoch."
    )
    return Section("Error against epochs", note, figures)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(x for x, _ in points), tuple(y for _, y in points)


def _distillation(groups: Sequence[Group]) -> Section:
    series: list[Series] = []
    for group, run, number, colour in _each_run(groups):
        if run.teacher_error is None:
            continue
        points = [(float(e.epoch), e.error) for e in run.evaluations]
        label = f"{group.label}, teacher"
        name, ends = run_name(group, run), (1.0, float(run.config.recipe.epochs))
        series.append(Series(name, group.label, (number,), colour, "line", *_columns(points)))
        level = (run.teacher_error, run.teacher_error)
        series.append(
            Series(f"{name}: its teacher", label, (number,), colour, "dashes", ends, level)
        )
    figure = Figure(
        "distillation",
        "Students and their teachers",
        Axis(EPOCHS),
        Axis("validation error", "%"),
        tuple(series),
    )
    note = "Dashed: the teacher's own validation error, measured before the student's first step."
    return Section("Distillation", note, (figure,))


def _learning_rate(groups: Sequence[Group]) -> Section:
    warm = [warmup_steps(g.config.recipe, g.config.steps_per_epoch) for g in groups]
    end = max(
        (1.6 * steps / g.config.steps_per_epoch for g, steps in zip(groups, warm, strict=True)),
        default=0.0,
    )
    whole, close = [], []
    for colour, group in enumerate(groups):
        asked = [(x, lr) for x, lr in _schedule(group.config)]
        logged = _logged_lr(group)
        for kept, limit in ((whole, float("inf")), (close, end)):
            for points, shape in ((asked, "line"), (logged, "small")):
                inside = _columns([point for point in points if point[0] <= limit])
                kind = "config" if shape == "line" else "logged"
                name = f"{group.label}, {kind}"
                kept.append(Series(name, group.label, group.numbers, colour, shape, *inside))
    figures = [
        Figure(
            "learning-rate",
            "Learning rate",
            Axis(EPOCHS),
            Axis("learning rate", scale="log10"),
            tuple(whole),
        )
    ]
    if end:
        figures.append(
            Figure(
                "warm-up",
                "Warm-up, close up",
                Axis(EPOCHS, low=0.0, high=end),
                Axis("learning rate", low=0.0),
                tuple(close),
            )
        )
    note = "Lines: what the config asks for, at every step. Dots: what was logged while training."
    return Section("Learning rate", note, tuple(figures))


def _schedule(config: Config) -> list[tuple[float, float]]:
    """(epochs, lr) at the corners of the schedule, and between them as closely as is seen."""
    total, epoch = config.total_steps, config.steps_per_epoch
    corners = [warmup_steps(config.recipe, epoch), *(m * epoch for m in config.recipe.milestones)]
    steps = {0, total - 1} | {corner + d for corner in corners for d in (-1, 0)}
    steps |= {total * i // 120 for i in range(120)}
    return [(s / epoch, lr_at(config, s)) for s in sorted(steps) if 0 <= s < total]


def _logged_lr(group: Group) -> list[tuple[float, float]]:
    longest = max(group.runs, key=lambda run: len(run.lr))
    stride = max(len(longest.lr) // LR_DOTS, 1)
    epoch = group.config.steps_per_epoch
    return [((step - 1) / epoch, lr) for step, lr in longest.lr[::stride]]


def _throughput(groups: Sequence[Group]) -> Section:
    speed, waiting = [], []
    for group, run, number, colour in _each_run(groups):
        base = run_name(group, run), group.label, (number,), colour, "line"
        points = [(e.position, e.images_per_s) for e in run.epochs if e.images_per_s]
        speed.append(Series(*base, *_columns(points)))
        waits = [(e.position, 100 * e.data_wait) for e in run.epochs]
        waiting.append(Series(*base, *_columns(waits)))
    figures = (
        Figure(
            "throughput",
            "Throughput",
            Axis(EPOCHS),
            Axis("images a second, all ranks", low=0),
            tuple(speed),
        ),
        Figure(
            "data-wait",
            "Waiting for data",
            Axis(EPOCHS),
            Axis("share of the training time", "%", low=0),
            tuple(waiting),
        ),
    )
    note = "Training steps only: evaluations and checkpoints are not in it."
    return Section("Throughput", note, figures)
