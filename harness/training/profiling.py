"""The profile of a run's steps, rank by rank: run.profile_steps.

After a few steps, N steps are timed by the device's own clock, without a profiler, which would slow
them down; then a few are traced by torch.profiler. The run folder gets profile/table.txt, and a
trace for chrome://tracing, Perfetto or TensorBoard from rank 0 and from the straggling rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from harness.atomic_file import write_atomically
from harness.config.run_section import PROFILE_TRACED, PROFILE_WARM_UP
from harness.distributed import World
from harness.resilience.step_observer import StepObserver, StepPhase

PARTS = ("data wait", "forward", "backward", "all-reduce exposed", "optimizer")
BUSY = ("data wait", "forward", "backward", "optimizer")  # a rank's own work; the rest is waiting
STRAGGLES = 0.05  # relative to the others' busy time; less is chance
SHOWN_RANKS = 16
Mark = torch.cuda.Event | float  # a point in time: of the device's stream, or in seconds


class PhaseTimes:
    """Adds up the time of each phase of a step; on a GPU, as the device's stream sees it.

    There, "data wait" is how long the device idled for data, and "all-reduce exposed" lasts from
    the last gradient to the end of the last sum.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Mark, Mark]] = []
        self._open: tuple[str, Mark] | None = None
        self._begun = self._now()

    def _now(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def enter(self, phase: str | None) -> None:
        """End the current phase and begin `phase`; None: begin none."""
        now = self._now()
        if self._open is not None:
            self._spans.append((*self._open, now))
        self._open = None if phase is None else (phase, now)

    def ms_per_step(self, steps: int) -> dict[str, float]:
        """Return milliseconds per step of each part, of "other" and in "total". Synchronises."""
        end = self._now()
        if isinstance(end, torch.cuda.Event):
            end.synchronize()
        sums = dict.fromkeys(PARTS, 0.0)
        for name, start, stop in self._spans:
            if name in sums:
                sums[name] += self._ms(start, stop) / steps
        total = self._ms(self._begun, end) / steps
        return sums | {"other": total - sum(sums.values()), "total": total}

    def _ms(self, start: Mark, end: Mark) -> float:
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            return start.elapsed_time(end)
        return 1000 * (float(end) - float(start))  # type: ignore[arg-type]


@dataclass(frozen=True)
class ProfileReport:
    """Milliseconds per step by part, rank by rank; `text` renders them."""

    ranks: Sequence[dict[str, float]]
    straggling_rank: int | None
    text: str


class Profile(StepObserver):
    """Times and traces the steps that `run.profile_steps` asks for, from where the run begins.

    All ranks call `after_step` after the same steps.
    """

    def __init__(
        self, steps: int, world: World, control: dist.ProcessGroup | None, folder: Path
    ) -> None:
        self._steps, self._world, self._control = steps, world, control
        self._folder = folder / "profile"
        self._timed_to = PROFILE_WARM_UP + steps
        self._traced_to = self._timed_to + min(steps, PROFILE_TRACED)
        self._seen = 0  # steps of this process
        self._times: PhaseTimes | None = None
        self._trace: torch.profiler.profile | None = None
        self._traced_phase: torch.profiler.record_function | None = None
        self._local_ms: dict[str, float] = {}

    def on_phase(self, phase: StepPhase) -> None:
        if self._times is not None:
            self._times.enter(phase)
        if self._trace is not None:
            self._trace_phase(phase)

    def on_bucket_sent(self, last: bool) -> None:
        if last and self._times is not None:  # what follows waits for other ranks
            self._times.enter("all-reduce exposed")

    def on_step_end(self) -> None:
        if self._times is not None:
            self._times.enter(None)
        if self._trace is not None:
            self._trace_phase(None)

    def _trace_phase(self, phase: str | None) -> None:
        if self._traced_phase is not None:
            self._traced_phase.__exit__(None, None, None)
        self._traced_phase = None if phase is None else torch.profiler.record_function(phase)
        if self._traced_phase is not None:
            self._traced_phase.__enter__()

    def after_step(self, done: int) -> ProfileReport | None:
        """Begin or end a measurement where it is due, which synchronises; report it at its end."""
        self._seen += 1
        if not self._steps:
            return None
        if self._seen == PROFILE_WARM_UP:
            self._times = PhaseTimes(self._world.device)
        elif self._seen == self._timed_to and self._times is not None:
            self._local_ms, self._times = self._times.ms_per_step(self._steps), None
            self._trace = torch.profiler.profile(acc_events=True)
            self._trace.start()
        elif self._seen == self._traced_to and self._trace is not None:
            trace, self._trace = self._trace, None
            trace.stop()
            return self._report(trace, done - self._traced_to)
        return None

    def _report(self, trace: torch.profiler.profile, first_step: int) -> ProfileReport:
        ranks = [self._local_ms]
        if self._control is not None:
            ranks = [{} for _ in range(self._world.world_size)]
            dist.all_gather_object(ranks, self._local_ms, group=self._control)
        straggler, why = straggling_rank(ranks)
        first, last = first_step + PROFILE_WARM_UP + 1, first_step + self._timed_to
        table = f"{render(ranks, straggler)}\n{why}"
        text = f"profile of steps {first} to {last}, ms a step\n{table}"
        if self._world.rank in (0, straggler):
            self._folder.mkdir(exist_ok=True)
            file = self._folder / f"rank{self._world.rank}.pt.trace.json"
            trace.export_chrome_trace(str(file))
        if self._world.rank == 0:
            write_atomically(self._folder / "table.txt", f"{text}\n".encode())
        text = f"{text}\ntable and traces are in {self._folder}"
        return ProfileReport(ranks, straggler, text)


def straggling_rank(ranks: Sequence[dict[str, float]]) -> tuple[int | None, str]:
    """Return the rank that the others wait for, None where there is none, and a line on it."""
    if len(ranks) == 1:
        return None, "straggling rank: none, as there is one rank"
    busy = [sum(ms[part] for part in BUSY) for ms in ranks]
    rank = max(range(len(ranks)), key=lambda rank: busy[rank])
    others = [ms for other, ms in enumerate(ranks) if other != rank]
    usual = statistics.median(b for other, b in enumerate(busy) if other != rank)
    late = busy[rank] - usual
    if late <= STRAGGLES * usual:
        return None, f"straggling rank: none, the slowest takes {100 * late / usual:.1f} % longer"
    more = {p: ranks[rank][p] - statistics.median(ms[p] for ms in others) for p in BUSY}
    part = max(more, key=lambda part: more[part])
    return rank, (
        f"straggling rank: {rank}, {late:.1f} ms ({100 * late / usual:.0f} %) a step longer than "
        f"the median of the others before they can sum gradients; {more[part]:.1f} ms of it {part}"
    )


def render(ranks: Sequence[dict[str, float]], straggler: int | None) -> str:
    """Render a table: a line for each of the first ranks, the straggling one, and the mean."""
    columns = (*PARTS, "other", "total")
    shown = [r for r in range(len(ranks)) if r < SHOWN_RANKS or r == straggler]
    rows = [(str(rank), ranks[rank]) for rank in shown]
    rows.append(("mean", {c: statistics.fmean(ms[c] for ms in ranks) for c in columns}))
    lines = ["rank  " + "  ".join(columns)]
    for name, ms in rows:
        lines.append(f"{name:<6}" + "  ".join(f"{ms[c]:{len(c)}.2f}" for c in columns))
    return "\n".join(lines)
