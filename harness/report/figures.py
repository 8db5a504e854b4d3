"""The figures of a report, built from the groups of its runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from harness.config.schema import Config
from harness.recipe.schedule import lr_at
from harness.report.groups import Group, sweeps
from harness.report.runs import RecordedRun
from harness.report.svg import Axis, Figure, Series

LR_DOTS = 40  # per run
CLOSE_UP = 2 / 3  # the close-up shows training from this share of its epochs
EPOCHS = "epochs"
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Section:
    """Figures under one heading, with a sentence or two on what they show."""

    title: str
    note: str
    figures: tuple[Figure, ...]


def sections(groups: Sequence[Group]) -> list[Section]:
    """Sections with at least one non-empty figure."""
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


@dataclass(frozen=True)
class Member:
    """A run with its group, its number in the report and its group's colour."""

    group: Group
    run: RecordedRun
    number: int
    colour: int

    def line(self, points: Points) -> Series:
        """Draw `points` as this run's curve."""
        name = run_name(self.group, self.run)
        runs = (self.number,)
        return Series(name, self.group.label, runs, self.colour, "line", *columns(points))

    def validation(self) -> Points:
        """Return (epoch, validation error in %) of each evaluation."""
        return [(float(one.epoch), one.error) for one in self.run.evaluations]


def _members(groups: Sequence[Group]) -> list[Member]:
    return [
        Member(group, run, number, colour)
        for colour, group in enumerate(groups)
        for run, number in zip(group.runs, group.numbers, strict=True)
    ]


def columns(points: Points) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Split points into their x and their y values."""
    return tuple(x for x, _ in points), tuple(y for _, y in points)


def run_name(group: Group, run: RecordedRun) -> str:
    """Name a run by its group and seed, such as `gradual, seed 3`."""
    return f"{group.label}, seed {run.config.seed}"


def measured(mean: float, std: float | None) -> str:
    """Format an error such as 23.74 ± 0.09 %."""
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
        legend=True,
    )
    note = "Mean over the seeds; bars are ± one standard deviation. The paper's figure 1."
    return Section("Minibatch", note, (figure,))


def _sweep(sweep: Sequence[Group], name: str, colour: int) -> Iterator[Series]:
    """Yield a sweep's line, then each group's expected and measured point."""
    numbers = tuple(number for group in sweep for number in group.numbers)
    x = tuple(float(group.config.recipe.minibatch) for group in sweep)
    y = tuple(group.mean or 0.0 for group in sweep)
    yield Series(f"{name}, line", "", numbers, colour, "line", x, y, hover=("",) * len(x))
    for group, kn, mean in zip(sweep, x, y, strict=True):
        expect, runs = group.expect, len(group.errors)
        points = [("expected", expect.error, expect.std, expect.source)] if expect else []
        points.append((name, mean, group.std, f"{runs} run{'s' if runs > 1 else ''}"))
        for kind, error, std, source in points:
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
    members = _members(groups)
    training = [
        member.line(
            [(e.position, e.train_error) for e in member.run.epochs if e.train_error is not None]
        )
        for member in members
    ]
    validation = [member.line(member.validation()) for member in members]
    note = (
        "One line per run. The training error is the mean over an epoch's crops while the weights "
        "change; the validation error covers all validation images after the epoch."
    )
    starts = [CLOSE_UP * member.run.config.recipe.epochs for member in members]
    whole, late = [], []
    for kind, series in (("Training", training), ("Validation", validation)):
        name, axes = f"{kind.lower()}-error", (Axis(EPOCHS), Axis(f"{kind.lower()} error", "%"))
        whole.append(Figure(name, f"{kind} error", *axes, tuple(series)))
        ends = tuple(_from(one, start) for one, start in zip(series, starts, strict=True))
        late.append(Figure(f"{name}-late", f"{kind} error, the last third", *axes, ends))
    return Section("Error against epochs", note, (*whole, *late))


def _from(series: Series, start: float) -> Series:
    """Keep the points from epoch `start` on."""
    kept = [point for point in zip(series.x, series.y, strict=True) if point[0] >= start]
    x, y = columns(kept)
    return replace(series, x=x, y=y)


def _distillation(groups: Sequence[Group]) -> Section:
    series: list[Series] = []
    late: list[Series] = []
    for member in _members(groups):
        error = member.run.teacher_error
        if error is None:
            continue
        student = member.line(member.validation())
        ends = columns([(1.0, error), (float(member.run.config.recipe.epochs), error)])
        name, legend = f"{student.name}: its teacher", f"{student.legend}: its teacher"
        teacher = Series(name, legend, student.runs, student.colour, "dashes", *ends)
        start = CLOSE_UP * member.run.config.recipe.epochs
        series += [student, teacher]
        late += [_from(student, start), replace(teacher, x=(start, ends[0][1]))]
    axes = Axis(EPOCHS), Axis("validation error", "%")
    title = "Students and their teachers"
    figures = (
        Figure("distillation", title, *axes, tuple(series), legend=True),
        Figure("distillation-late", f"{title}, the last third", *axes, tuple(late), legend=True),
    )
    note = "Dashed: the teacher's own validation error, measured before the student's first step."
    return Section("Distillation", note, figures)


def _learning_rate(groups: Sequence[Group]) -> Section:
    warm = [g.config.warmup_steps for g in groups]
    end = max(
        (1.6 * steps / g.config.steps_per_epoch for g, steps in zip(groups, warm, strict=True)),
        default=0.0,
    )
    whole: list[Series] = []
    close: list[Series] = []
    for colour, group in enumerate(groups):
        asked, logged = _schedule(group.config), _logged_lr(group)
        for kept, limit in ((whole, float("inf")), (close, end)):
            inside = [columns([p for p in points if p[0] <= limit]) for points in (asked, logged)]
            own = group.label, group.numbers, colour
            kept.append(Series(f"{group.label}, config", *own, "line", *inside[0]))
            kept.append(Series(f"{group.label}, logged", *own, "small", *inside[1]))
    log_lr, lr = Axis("learning rate", scale="log10"), Axis("learning rate", low=0.0)
    figures = [Figure("learning-rate", "Learning rate", Axis(EPOCHS), log_lr, tuple(whole))]
    if end:
        early = Axis(EPOCHS, low=0.0, high=end)
        figures.append(Figure("warm-up", "Warm-up, close up", early, lr, tuple(close)))
    note = "Lines: the config's schedule, at every step. Dots: the values logged while training."
    return Section("Learning rate", note, tuple(figures))


def _schedule(config: Config) -> Points:
    """Return (epochs, lr) at the corners of the schedule and as finely as is visible between."""
    recipe, total, epoch = config.recipe, config.total_steps, config.steps_per_epoch
    warm = recipe.warmup_end * epoch
    jumps = {m * epoch for m in recipe.milestones} if recipe.decay == "steps" else set()
    jumps |= {warm} if recipe.warmup == "constant" and 0 < warm < total else set()
    steps = {0, warm, total - 1, *jumps, *(total * i // 120 for i in range(120))}
    points = []
    for step in sorted(step for step in steps if step < total):
        if step in jumps:  # a vertical line
            points.append((step / epoch, lr_at(config, step - 1)))
        points.append((step / epoch, lr_at(config, step)))
    return points


def _logged_lr(group: Group) -> Points:
    longest = max(group.runs, key=lambda run: len(run.lr))
    stride = max(len(longest.lr) // LR_DOTS, 1)
    epoch = group.config.steps_per_epoch
    return [((step - 1) / epoch, lr) for step, lr in longest.lr[::stride]]


def _throughput(groups: Sequence[Group]) -> Section:
    speed, waiting = [], []
    for member in _members(groups):
        epochs = member.run.epochs
        speed.append(member.line([(e.position, e.images_per_s) for e in epochs if e.images_per_s]))
        waiting.append(member.line([(e.position, 100 * e.data_wait) for e in epochs]))
    rate = Axis("images per second, all ranks", low=0)
    share = Axis("share of the training time", "%", low=0)
    figures = (
        Figure("throughput", "Throughput", Axis(EPOCHS), rate, tuple(speed)),
        Figure("data-wait", "Waiting for data", Axis(EPOCHS), share, tuple(waiting)),
    )
    note = "Training steps only, without evaluations and checkpoints."
    return Section("Throughput", note, figures)
