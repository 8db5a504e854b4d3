"""Where the time of a step goes, rank by rank: run.profile_steps.

After a few steps N steps are timed by the device's own clock, without a profiler, as one would slow
them; then a few are traced by torch.profiler. The run folder gets profile/table.txt, and a
trace for chrome://tracing, Perfetto or TensorBoard of rank 0 and of the straggling rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from harness.atomic_file import write_atomically
from harness.config.run_section import PROFILE_TRACED, PROFILE_WARM_UP
from harness.distributed import World
from harness.training.run_logger import RunLogger
from harness.training.step import Step, no_span

PARTS = ("data wait", "forward", "backward", "all-reduce exposed", "optimizer")
BUSY = ("data wait", "forward", "backward", "optimizer")  # a rank's own; the rest is waiting
STRAGGLES = 0.05  # of the others' busy time; less is chance
SHOWN_RANKS = 16


class PartTimes:
    """Adds up the time of each part of a step, on a GPU as the device's stream sees it.

    There, "data wait" is the time that the device stood still for data, and "all-reduce exposed"
    that from the last gradient to the end of the last sum.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._made: Any = None
        self._begun = self._now()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def all_made(self) -> None:
        """The backward pass has made its last gradient; what follows waits for other ranks."""
        self._made = self._now()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within: a part of the step, under its name in a trace too."""
        start = self._now()
        with torch.profiler.record_function(name):
            yield
        end = self._now()
        if self._made is not None:  # only ever set within a backward pass
            self._spans.append(("all-reduce exposed", self._made, end))
            end, self._made = self._made, None
        self._spans.append((name, start, end))

    def ms_a_step(self, steps: int) -> dict[str, float]:
        """Milliseconds a step of each part, of "other" and in "total". Synchronises."""
        end = self._now()
        if self._cuda:
            end.synchronize()
        sums = dict.fromkeys(PARTS, 0.0)
        for name, start, stop in self._spans:
            sums[name] += self._ms(start, stop) / steps
        total = self._ms(self._begun, end) / steps
        return sums | {"other": total - sum(sums.values()), "total": total}

    def _ms(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self._cuda else 1000 * (end - start)


class Profile:
    """Follows the run's loop; every rank calls `after_step` after the same steps."""

    def __init__(
        self,
        steps: int,
        first_step: int,
        step: Step,
        world: World,
        control: dist.ProcessGroup | None,
        folder: Path,
        journal: RunLogger,
    ) -> None:
        self._steps, self._step, self._world, self._control = steps, step, world, control
        self._folder, self._journal = folder / "profile", journal
        self._timed_from = first_step + PROFILE_WARM_UP
        self._timed_to = self._timed_from + steps
        self._traced_to = self._timed_to + min(steps, PROFILE_TRACED)
        self._profiler: torch.profiler.profile | None = None
        self._times: PartTimes | None = None
        self._mine: dict[str, float] = {}

    def after_step(self, done: int) -> None:
        """Starts, ends and reports at the right steps. Synchronises where it does."""
        if not self._steps:
            return
        if done == self._timed_from:
            self._measure()
        elif done == self._timed_to and self._times is not None:
            self._mine = self._times.ms_a_step(self._steps)
            self._profiler = torch.profiler.profile(acc_events=True)
            self._profiler.start()
        elif done == self._traced_to and self._profiler is not None:
            self._profiler.stop()
            self._step.part, self._step.reductions.all_made = no_span, lambda: None
            self._report(self._profiler)

    def _measure(self) -> None:
        self._times = PartTimes(self._step.device)
        self._step.part = self._times.part
        self._step.reductions.all_made = self._times.all_made

    def _report(self, profiler: torch.profiler.profile) -> None:
        ranks = [self._mine]
        if self._control is not None:
            ranks = [{} for _ in range(self._world.world_size)]
            dist.all_gather_object(ranks, self._mine, group=self._control)
        straggler, why = straggling_rank(ranks)
        if self._world.rank in (0, straggler):
            self._folder.mkdir(exist_ok=True)
            trace = self._folder / f"rank{self._world.rank}.pt.trace.json"
            profiler.export_chrome_trace(str(trace))
        if self._world.rank == 0:
            first, last = self._timed_from + 1, self._timed_to
            text = (
                f"profile of steps {first} to {last}, ms a step\n{render(ranks, straggler)}\n{why}"
            )
            write_atomically(self._folder / "table.txt", f"{text}\n".encode())
            self._journal.say(f"{text}\ntable and traces are in {self._folder}")
            self._journal.event("profile", self._traced_to, ranks=ranks, straggling_rank=straggler)


def straggling_rank(ranks: Sequence[dict[str, float]]) -> tuple[int | None, str]:
    """The rank that the others wait for, and a line on it; None where no rank stands out."""
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
    """The table: a line for each of the first ranks and the straggling one, and their mean."""
    columns = (*PARTS, "other", "total")
    shown = [r for r in range(len(ranks)) if r < SHOWN_RANKS or r == straggler]
    rows = [(str(rank), ranks[rank]) for rank in shown]
    rows.append(("mean", {c: statistics.fmean(ms[c] for ms in ranks) for c in columns}))
    lines = ["rank  " + "  ".join(columns)]
    for name, ms in rows:
        lines.append(f"{name:<6}" + "  ".join(f"{ms[c]:{len(c)}.2f}" for c in columns))
    return "\n".join(lines)
