"""What being interruptible costs, and what an interruption costs.

    python -m benchmarks.interruption [--ranks 1,2] [--repetitions 100] [--write]

- Agreement, counters, watchdog and log lines against the same loop without them: blocks of steps
  that alternate in one process a rank. The figures are with / without of neighbouring blocks, once
  of the time on the clock, which on shared cores varies by more than is looked for, and once of
  the processor time of all threads of rank 0, which does not count what others do to the machine.
  The calls are also made by themselves: their processor time as a share of a step's.
- A checkpoint of ResNet-50: bytes, how long the step stands for the copy, how long the thread
  writes, how long it takes to read.
- From the start of `harness train --resume` to its first new step, beside a start from nothing.
- Work lost to a SIGKILL at a random moment, by the interval of checkpoints.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks.conditions import spread, write_results
from benchmarks.step import case_config, make_batches
from harness.checkpoint import (
    checkpoint_key,
    checkpoint_path,
    copy_to_host,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from harness.data.prepare import prepare_digits
from harness.distributed import World, barrier, process_group, world_from_environment
from harness.interrupt import Agreement, StopRequest
from harness.journal import Journal
from harness.metrics import Metrics
from harness.models import build_model
from harness.recipe.minibatch import Minibatch
from harness.recipe.schedule import lr_at
from harness.step import Step, set_precision
from harness.watchdog import Doing, Watchdog

CASES = [("resnet8", 16, 32, 8, 8), ("resnet20", 32, 32, 4, 4)]  # as in benchmarks/step.py
BLOCK_S = 0.25  # short, so that what else the machine does is the same for both of a pair
FEW = 6  # repetitions of what is not compared
LOG_EVERY_STEPS = 20
KINDS = "", "_processor_time"  # of the figure
INTERVALS_S = (0.5, 2.0, 8.0)
CONFIG = """
expect: {{error: 100, source: "a benchmark"}}
data: {{train_images: 1437, val_images: 360, classes: 10, crop: {size}, resize: {size}}}
model: {{name: {model}}}
recipe: {{minibatch: {minibatch}, worker_batch: 32, reference_minibatch: 256, epochs: 1000,
  milestones: []}}
run: {{data_root: {data}, device: cpu, loader: memory, log_every_steps: 1, keep_checkpoints: 2,
  evaluate_every_epochs: 995}}
"""


class NoMetrics(Metrics):
    """Counts nothing."""

    def add_micro_batch(self, *arguments: object) -> None:
        """Nothing."""

    def end_step(self, *arguments: object) -> None:
        """Nothing."""


def cost_blocks(
    case: tuple[str, int, int, int, int], world: World, group: Any, folder: Path
) -> list[Callable[[int], None]]:
    """The loop with everything, without, and everything without the loop."""
    config = case_config(*case)
    minibatch = Minibatch(config.workers, config.recipe.worker_batch)
    micro_batches = minibatch.micro_batches(
        world.rank, world.world_size, int(config.run.micro_batch)
    )
    step = Step(config, build_model(config).to(world.device), world, micro_batches)
    counted, uncounted = step.metrics, NoMetrics(world.device, config.recipe.minibatch)
    size = len(micro_batches[0]) * config.recipe.worker_batch
    endless = make_batches(
        config.model_copy(update={"run": config.run.model_copy(update={"micro_batch": size})})
    )
    batches = itertools.cycle(endless)
    journal = Journal(folder if world.rank == 0 else None, config, 0)
    stop, done = StopRequest(), 0

    def with_all(steps: int) -> None:
        nonlocal done
        step.metrics, agreement = counted, Agreement(group)
        with Watchdog(world, 300.0, stop) as watchdog:
            watched = watchdog.watch(batches, lambda: done, Doing.COMPUTING)
            for _ in range(steps):
                watchdog.at(done, Doing.LOADING)
                step(done % config.total_steps, watched)
                done += 1
                agreement.after_step(stop.signal is not None, False)
                if done % LOG_EVERY_STEPS == 0:
                    lr = lr_at(config, done % config.total_steps)
                    journal.train_line(done, counted.read(), lr, step.data_wait_s)
            agreement.close()

    def without(steps: int) -> None:
        nonlocal done
        step.metrics = uncounted
        for _ in range(steps):
            step(done % config.total_steps, batches)
            done += 1

    logits, labels = torch.zeros(size, 10), torch.zeros(size, dtype=torch.int64)

    def bookkeeping(steps: int) -> None:
        """All that `with_all` does, but for the step itself."""
        nonlocal done
        agreement = Agreement(group)
        with Watchdog(world, 300.0, stop) as watchdog:
            for _ in range(steps):
                watchdog.at(done, Doing.LOADING)
                watchdog.at(done, Doing.COMPUTING)
                counted.add_micro_batch(logits[0, 0], logits, labels)
                counted.end_step(done)
                done += 1
                agreement.after_step(stop.signal is not None, False)
                if done % LOG_EVERY_STEPS == 0:
                    lr = lr_at(config, done % config.total_steps)
                    journal.train_line(done, counted.read(), lr, step.data_wait_s)
            agreement.close()

    return [with_all, without, bookkeeping]


def measure_cost(rank: int, ranks: int, port: int, repetitions: int, folder: Path) -> None:
    """One rank of it; rank 0 leaves its rows in the folder."""
    environment: dict[str, object] = {"RANK": rank, "WORLD_SIZE": ranks}
    environment |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    set_precision("float32")
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the progress lines are written, not shown)
    world = world_from_environment("cpu")
    rows = []
    with process_group(world, 300) as group:
        for number, case in enumerate(CASES):
            place = folder / f"{number}"
            if rank == 0:
                place.mkdir()
            barrier(group)
            *blocks, bookkeeping = cost_blocks(case, world, group, place)
            begun_s = time.perf_counter()
            for block in (*blocks, *blocks):
                block(2)
            steps = torch.tensor(max(round(BLOCK_S / (time.perf_counter() - begun_s) * 8), 2))
            if group is not None:
                dist.broadcast(steps, 0)
            rows.append({"model": case[0], "ranks": ranks, "steps_a_block": int(steps)})
            rows[-1] |= compared(group, blocks, bookkeeping, int(steps), repetitions)
    if rank == 0:
        torch.save(rows, folder / "rows.pt")


def compared(
    group: Any,
    blocks: list[Callable[[int], None]],
    bookkeeping: Callable[[int], None],
    steps: int,
    repetitions: int,
) -> dict[str, Any]:
    """The blocks in turn, each first as often as second, and the bookkeeping after them."""
    clock, processor, alone_ms, step_ms, alone_steps = [], [], [], [], 10 * LOG_EVERY_STEPS
    for repetition in range(repetitions):
        times = {}
        for block in blocks if repetition % 2 else reversed(blocks):
            barrier(group)
            times[block] = timed(block, steps)
        (with_s, with_cpu_s), (without_s, without_cpu_s) = (times[block] for block in blocks)
        clock.append(with_s / without_s)
        processor.append(with_cpu_s / without_cpu_s)
        step_ms.append((1000 * without_s / steps, 1000 * without_cpu_s / steps))
        barrier(group)
        alone_ms.append(1000 * timed(bookkeeping, alone_steps)[1] / alone_steps)
    return {
        "with_to_without": spread(clock),
        "with_to_without_processor_time": spread(processor),
        "step_ms": spread([on_clock for on_clock, _ in step_ms]),
        "step_processor_ms": spread([busy for _, busy in step_ms]),
        "alone_processor_ms_a_step": spread(alone_ms),
    }


def timed(block: Callable[[int], None], steps: int) -> tuple[float, float]:
    """Seconds on the clock, and of processor time in all threads of this process."""
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    block(steps)
    return time.perf_counter() - begun_s, time.process_time() - begun_cpu_s


def costs(ranks: list[int], repetitions: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of with / without, for each number of ranks."""
    rows = []
    for world_size in ranks:
        place = folder / f"cost-{world_size}"
        place.mkdir()
        port = 20000 + random.SystemRandom().randrange(12000)
        multiprocessing.spawn(
            measure_cost, (world_size, port, repetitions, place), nprocs=world_size
        )
        rows += torch.load(place / "rows.pt", weights_only=False)  # written above
    for row in rows:
        clock, processor = (quartiles(row[f"with_to_without{kind}"]) for kind in KINDS)
        alone_ms, step_ms = (
            row[key]["median"] for key in ("alone_processor_ms_a_step", "step_processor_ms")
        )
        print(
            f"{row['model']:9} {row['ranks']} ranks, step {row['step_ms']['median']:6.1f} ms   "
            f"with/without {clock}, processor time {processor}   "
            f"by itself {alone_ms:.3f} ms, {100 * alone_ms / step_ms:.2f} % of it"
        )
    return rows


def quartiles(value: dict[str, float]) -> str:
    """The median, and the quartiles on both sides of it."""
    return f"{value['median']:.4f} ({value['quartile_1']:.4f}, {value['quartile_3']:.4f})"


def checkpoint_of_resnet50(repetitions: int, folder: Path) -> dict[str, Any]:
    """Seconds and bytes of one checkpoint."""
    config = case_config("resnet50", 64, 32, 1, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(0, 1, 0, 1, "alone", device)
    step = Step(config, build_model(config).to(device), world, [range(1)])
    step(0, iter(make_batches(config)))
    path = checkpoint_path(folder, 1, 1)
    copy_s: list[float] = []
    write_s: list[float] = []
    read_s: list[float] = []
    for _ in range(repetitions):
        times = [time.perf_counter()]
        payload = copy_to_host(step.state_dict()) | {"step": 1}
        times.append(time.perf_counter())
        save_checkpoint(path, payload)
        times.append(time.perf_counter())
        load_checkpoint(path)
        times.append(time.perf_counter())
        for values, begun_s, ended_s in zip(
            (copy_s, write_s, read_s), times[:-1], times[1:], strict=True
        ):
            values.append(ended_s - begun_s)
    copied, written, read = spread(copy_s), spread(write_s), spread(read_s)
    size = path.stat().st_size
    print(
        f"checkpoint of ResNet-50: {size / 1e6:.0f} MB; the step stands for "
        f"{copied['median']:.3f} s; written in {written['median']:.2f} s, "
        f"read in {read['median']:.2f} s"
    )
    return {"bytes": size, "copy_s": copied, "write_s": written, "read_s": read}


def start(config: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    """`harness train` in a process of its own."""
    command = [sys.executable, "-m", "harness", "train", str(config), "--out", str(out)]
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def step_lines(process: subprocess.Popen[str]) -> Any:
    """The number of each step as its line comes."""
    assert process.stdout is not None
    for line in process.stdout:
        if "  step " in line:
            yield int(line.split("  step ")[1].split("/")[0])


def write_config(folder: Path, model: str, size: int, minibatch: int) -> Path:
    """A config on the digits that goes on for as long as it is let."""
    data = folder / "digits"
    if not data.exists():
        prepare_digits(data)
    path = folder / f"{model}.yaml"
    path.write_text(CONFIG.format(model=model, size=size, minibatch=minibatch, data=data))
    return path


def time_to_first_step(repetitions: int, folder: Path) -> dict[str, Any]:
    """Seconds from the start of the process to the first step done, ResNet-50 on the digits."""
    config = write_config(folder, "resnet50", 32, 32)
    first_s: dict[str, list[float]] = {"from nothing": [], "resumed": []}
    for _ in range(repetitions):
        out = folder / "start"
        shutil.rmtree(out, ignore_errors=True)
        for name in first_s:
            begun_s = time.perf_counter()
            process = start(config, out, "--resume")
            next(step_lines(process))
            first_s[name].append(time.perf_counter() - begun_s)
            process.terminate()  # stops with a checkpoint
            process.communicate(timeout=120)
    row = {name.replace(" ", "_"): spread(values) for name, values in first_s.items()}
    print(
        "start of the process to the first step (ResNet-50): "
        + ", ".join(f"{name} {spread(values)['median']:.1f} s" for name, values in first_s.items())
    )
    return row


def lost_work(kills: int, folder: Path) -> list[dict[str, Any]]:
    """Seconds of training lost to a SIGKILL at a random moment."""
    config, moments = write_config(folder, "resnet8", 96, 32), random.Random(1)
    rows = []
    for interval_s in INTERVALS_S:
        lost_s = []
        for _ in range(kills):
            out = folder / "killed"
            shutil.rmtree(out, ignore_errors=True)
            process = start(config, out, f"run.checkpoint_every_minutes={interval_s / 60}")
            lines = step_lines(process)
            first, begun_s = next(lines), time.perf_counter()
            end_s = begun_s + interval_s + moments.uniform(0, interval_s)
            last = first
            while time.perf_counter() < end_s:
                last = next(lines)
            process.kill()
            steps_per_s = (last - first) / (time.perf_counter() - begun_s)
            last = max([last, *lines])
            process.communicate()
            kept = list_checkpoints(out / "checkpoints")
            saved = checkpoint_key(kept[0])[1] if kept else 0
            lost_s.append((last - saved) / steps_per_s)
        rows.append({"interval_s": interval_s, "lost_s": spread(lost_s)})
        print(
            f"killed at random, a checkpoint every {interval_s} s (and at an epoch's end): "
            f"lost {spread(lost_s)['median']:.2f} s of training, at most {max(lost_s):.2f} s"
        )
    return rows


def main() -> None:
    """Prints the figures; --write keeps them in benchmarks/results/interruption.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--repetitions", type=int, default=100, help="pairs of blocks")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = {
            "cost": costs([int(n) for n in options.ranks.split(",")], options.repetitions, folder),
            "checkpoint_resnet50": checkpoint_of_resnet50(FEW, folder),
            "first_step_s": time_to_first_step(FEW, folder),
            "lost_work": lost_work(FEW, folder),
        }
    if options.write:
        print(write_results("interruption", content))


if __name__ == "__main__":
    main()
