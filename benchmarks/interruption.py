"""The cost of an interruption: checkpoints, and the work lost to a SIGKILL.

    python -m benchmarks.interruption [--repetitions 6] [--write]

- A checkpoint of ResNet-50: bytes, how long the step pauses for the copy, how long the thread
  writes, how long it takes to read.
- Work lost to a SIGKILL at a random moment, by the interval between checkpoints.

`startup.py` measures a resume, `bookkeeping.py` the cost of being interruptible per step.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.conditions import benchmark_parser, spread, write_results
from benchmarks.loops import make_batches
from benchmarks.startup import start, step_lines, write_config
from benchmarks.step import case_config
from harness.distributed import World
from harness.models.registry import build_model
from harness.runs.checkpoint import (
    checkpoint_key,
    checkpoint_path,
    copy_to_host,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from harness.training.replica import Replica
from harness.training.step import Step

INTERVALS_S = (0.5, 2.0, 8.0)


def checkpoint_of_resnet50(repetitions: int, folder: Path) -> dict[str, Any]:
    """Return seconds and bytes of one checkpoint."""
    config = case_config("resnet50", 64, 32, 1, 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(0, 1, 0, 1, "alone", device)
    replica = Replica(config, build_model(config).to(device), world)
    step = Step(config, replica, [range(1)])
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
        f"checkpoint of ResNet-50: {size / 1e6:.0f} MB; the step pauses for "
        f"{copied['median']:.3f} s; written in {written['median']:.2f} s, "
        f"read in {read['median']:.2f} s"
    )
    return {"bytes": size, "copy_s": copied, "write_s": written, "read_s": read}


def lost_work(kills: int, folder: Path) -> list[dict[str, Any]]:
    """Return seconds of training lost to a SIGKILL at a random moment."""
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
    """Print the figures; --write stores them in benchmarks/results/interruption.json."""
    options = benchmark_parser(__doc__, repetitions=6).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = {
            "checkpoint_resnet50": checkpoint_of_resnet50(options.repetitions, folder),
            "lost_work": lost_work(options.repetitions, folder),
        }
    if options.write:
        print(write_results("interruption", content, options.write))


if __name__ == "__main__":
    main()
