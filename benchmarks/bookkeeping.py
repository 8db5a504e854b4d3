"""The cost of being interruptible, per step: agreement, counters, watchdog and log lines.

    python -m benchmarks.bookkeeping [--ranks 1,2] [--repetitions 20] [--write]

- The loop with and without them: blocks of steps that alternate in one process per
  rank, with / without for neighbouring blocks, in wall time and processor time. On shared cores
  both vary by more than the effect.
- Part by part, in the real loop: processor time of the loop's thread in these calls, of all
  threads at a log line, and of the threads that exist only for this (the control group's,
  the watchdog's, TensorBoard's), as a share of a step's. This figure must stay below 1 %.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks.conditions import benchmark_parser, spread, timed, write_results
from benchmarks.loops import LOG_EVERY_STEPS, make_batches
from benchmarks.step import Case, case_config
from harness.distributed import World, barrier, process_group, world_from_environment
from harness.execution.precision import set_precision
from harness.models.registry import build_model
from harness.outcome import State
from harness.recipe.minibatch import Minibatch
from harness.recipe.schedule import lr_at
from harness.rendezvous import rendezvous
from harness.resilience.agreement import Agreement
from harness.resilience.stopping import StopRequest
from harness.resilience.watchdog import Phase, Watchdog
from harness.runs.run_folder import RunFolder
from harness.training.metrics import Metrics
from harness.training.replica import Replica
from harness.training.run_logger import RunLogger
from harness.training.step import Step

CASES = [Case("resnet8", 16, 32, 8, 8), Case("resnet20", 32, 32, 4, 4)]
BLOCK_S = 0.25  # short, so both blocks of a pair see the same load on the machine
METERED_STEPS = LOG_EVERY_STEPS
KINDS = "", "_processor_time"  # suffixes of a figure's names
PARTS = "counters", "agreement", "log lines", "threads"


class NoMetrics(Metrics):
    """Metrics that count nothing."""

    def add_micro_batch(self, *arguments: object) -> None:
        """Do nothing."""

    def end_step(self, *arguments: object) -> None:
        """Do nothing."""


class MeteredMetrics(Metrics):
    """Metrics that time their calls in a step."""

    meter: Meter

    def add_micro_batch(self, *arguments: Any) -> None:
        """Time the call of a micro-batch."""
        with self.meter("counters"):
            super().add_micro_batch(*arguments)

    def end_step(self, *arguments: Any) -> None:
        """Time the call at a step's end."""
        with self.meter("counters"):
            super().end_step(*arguments)


class Meter:
    """Processor seconds by activity; counted only while `on`."""

    def __init__(self, group: Any) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.on = False
        # thread numbers increase: so far the control group's are the last
        loops = [t for t in threads() if (TASKS / t / "comm").read_text() == "gloo_tcp_loop\n"]
        self._first = int(loops[-1]) if group is not None else int(threads()[-1]) + 1

    @contextmanager
    def __call__(self, name: str, clock: Callable[[], float] = time.thread_time) -> Iterator[None]:
        """Count the processor time of the block, if it is on."""
        begun_s = clock()
        yield
        if self.on:
            self.seconds[name] += clock() - begun_s

    def threads_s(self) -> float:
        """Return the processor time of the threads that exist only for the bookkeeping."""
        mine = [t for t in threads() if int(t) >= self._first]
        return sum(int((TASKS / t / "schedstat").read_text().split()[0]) for t in mine) / 1e9


TASKS = Path("/proc/self/task")


def threads() -> list[str]:
    """List this process's threads, the oldest first."""
    return sorted((path.name for path in TASKS.iterdir()), key=int)


class Loop:
    """One rank's loop, with and without the bookkeeping."""

    def __init__(self, case: Case, world: World, group: Any, folder: Path) -> None:
        self.config, self.world, self.group = case_config(*case), world, group
        self.meter = Meter(group)
        minibatch = Minibatch.of(self.config)
        ranks = world.rank, world.world_size
        micro_batches = minibatch.micro_batches(*ranks, int(self.config.run.micro_batch))
        model = build_model(self.config).to(world.device)
        self.step = Step(self.config, Replica(self.config, model, world), micro_batches)
        self.counted = MeteredMetrics(world.device, self.config.recipe.minibatch)
        self.counted.meter = self.meter
        self.uncounted = NoMetrics(world.device, self.config.recipe.minibatch)
        size = len(micro_batches[0]) * self.config.recipe.worker_batch
        run = self.config.run.model_copy(update={"micro_batch": size})
        self.batches = itertools.cycle(make_batches(self.config.model_copy(update={"run": run})))
        self.folder = RunFolder(folder / "run")
        if world.rank == 0:
            self.folder.open(self.config, {})
            self.folder.write_status(State.RUNNING)
        self.logger = RunLogger(self.folder.path if world.rank == 0 else None, self.config, 0)
        self.stop, self.done = StopRequest(), 0

    def with_all(self, steps: int) -> None:
        """Run steps as in `harness train`."""
        self.step.metrics, agreement = self.counted, Agreement(self.group)
        with Watchdog(self.world, 300.0, self.stop) as watchdog:
            watchdog.join_ranks()
            watched = watchdog.watch(self.batches, lambda: self.done, Phase.COMPUTING)
            threads_s = self.meter.threads_s()
            for _ in range(steps):
                with self.meter("agreement"):
                    watchdog.enter_phase(self.done, Phase.LOADING)
                self.step(self.done, watched)
                self.done += 1
                with self.meter("agreement"):
                    agreement.after_step(self.stop.signal is not None, False)
                if self.done % LOG_EVERY_STEPS == 0:
                    with self.meter("log lines", time.process_time):
                        self._log_line()
            agreement.close()
            self.meter.seconds["threads"] = self.meter.threads_s() - threads_s

    def without(self, steps: int) -> None:
        """Run only the steps with their all-reduces and updates."""
        self.step.metrics = self.uncounted
        for _ in range(steps):
            self.step(self.done, self.batches)
            self.done += 1

    def metered_ms(self) -> dict[str, float]:
        """Return processor milliseconds per step by part, in `with_all` between two log lines."""
        self.done, self.meter.on = 0, True
        self.meter.seconds.update(dict.fromkeys(PARTS, 0.0))
        self.with_all(METERED_STEPS)
        self.meter.on = False
        return {name: 1000 * s / METERED_STEPS for name, s in self.meter.seconds.items()}

    def _log_line(self) -> None:
        reading, lr = self.counted.read(), lr_at(self.config, self.done)
        self.logger.train_line(self.done, reading, lr, self.step.take_data_wait_s())
        if self.world.rank == 0:
            self.folder.report(step=self.done, total_steps=self.config.total_steps)


def measure_cost(rank: int, ranks: int, port: int, repetitions: int, folder: Path) -> None:
    """Run one rank; rank 0 saves its rows in the folder."""
    environment: dict[str, object] = {"RANK": rank, "WORLD_SIZE": ranks}
    environment |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    set_precision("float32")
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (progress lines are written, but not shown)
    world = world_from_environment("cpu")
    rows = []
    with process_group(world, rendezvous(world, 300), 300) as group:
        for case in CASES:
            place = folder / case.model
            if rank == 0:
                place.mkdir()
            barrier(group)
            loop = Loop(case, world, group, place)
            warm_up_s = sum(timed(lambda: block(2))[0] for block in blocks_of(loop) * 2)  # noqa: B023
            steps = torch.tensor(max(round(BLOCK_S / warm_up_s * 8), 2))
            if group is not None:
                dist.broadcast(steps, 0)
            rows.append({"case": f"{case.model} on {ranks} ranks", "steps_a_block": int(steps)})
            rows[-1] |= compared(group, loop, int(steps), repetitions)
    if rank == 0:
        torch.save(rows, folder / "rows.pt")


def blocks_of(loop: Loop) -> list[Callable[[int], None]]:
    """Return the two loops that are compared."""
    return [loop.with_all, loop.without]


def compared(group: Any, loop: Loop, steps: int, repetitions: int) -> dict[str, Any]:
    """Time the blocks in turn, each first as often as second, and then the parts."""
    clock, processor, parts_ms, share, step_ms = [], [], [], [], []
    for repetition in range(repetitions):
        times = []
        for block in blocks_of(loop)[:: -1 if repetition % 2 else 1]:
            barrier(group)
            times.append(timed(lambda: block(steps)))  # noqa: B023
        (with_s, with_cpu_s), (without_s, without_cpu_s) = times[:: -1 if repetition % 2 else 1]
        clock.append(with_s / without_s)
        processor.append(with_cpu_s / without_cpu_s)
        step_ms.append((1000 * without_s / steps, 1000 * without_cpu_s / steps))
        barrier(group)
        parts_ms.append(loop.metered_ms())
        share.append(100 * sum(parts_ms[-1].values()) / step_ms[-1][1])
    return {
        "with_to_without": spread(clock),
        "with_to_without_processor_time": spread(processor),
        "step_ms": spread([on_clock for on_clock, _ in step_ms]),
        "step_processor_ms": spread([busy for _, busy in step_ms]),
        "parts_processor_ms_a_step": {
            part: spread([ms[part] for ms in parts_ms]) for part in PARTS
        },
        "percent_of_step": spread(share),
    }


def costs(ranks: list[int], repetitions: int, folder: Path) -> list[dict[str, Any]]:
    """Return rows of with / without, for each number of ranks."""
    rows = []
    for world_size in ranks:
        place = folder / f"cost-{world_size}"
        place.mkdir()
        port = 20000 + random.SystemRandom().randrange(12000)
        multiprocessing.spawn(
            measure_cost, (world_size, port, repetitions, place), nprocs=world_size
        )
        rows += torch.load(place / "rows.pt", weights_only=False)  # written by `one_rank`
    for row in rows:
        clock, processor = (quartiles(row[f"with_to_without{kind}"]) for kind in KINDS)
        parts = row["parts_processor_ms_a_step"].items()
        print(
            f"{row['case']:20} step {row['step_ms']['median']:6.1f} ms   "
            f"with/without {clock}, processor time {processor}   "
            f"part by part {quartiles(row['percent_of_step'])} % of it: "
            + ", ".join(f"{part} {ms['median']:.3f} ms" for part, ms in parts)
        )
    return rows


def quartiles(value: dict[str, float]) -> str:
    """Format a median with its quartiles."""
    return f"{value['median']:.4f} ({value['quartile_1']:.4f}, {value['quartile_3']:.4f})"


def main() -> None:
    """Print the figures; --write stores them in benchmarks/results/bookkeeping.json."""
    parser = benchmark_parser(__doc__, repetitions=20)
    parser.add_argument("--ranks", default="1,2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        ranks = [int(number) for number in options.ranks.split(",")]
        rows = costs(ranks, options.repetitions, Path(name))
    if options.write:
        print(write_results("bookkeeping", {"cost": rows}, options.write))


if __name__ == "__main__":
    main()
