"""Images/s of the harness's training loop and of others, which take turns.

    python -m benchmarks.step [--starts 3] [--repetitions 10] [--block-seconds 0.5] [--write]

All train the same network from the same uint8 batches in memory, in the same precision, with the
same number of threads (`OMP_NUM_THREADS`); `loops.py` contains the loops and says what else each
does. Each has its own process, as its user would start it, and runs blocks of the same
number of steps, alternating forwards and backwards, while the others are paused. The figure
is the time of the other's block over that of the harness's in the same round (above 1: the harness
is faster), in wall and processor time. Rounds of several starts are combined, since
the memory layout of a process favours one loop or another by a few percent. On a CPU the cases are
one worker per step (k = m = 1), and the quickstart's 8; on a GPU 8 workers of 32 images, bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.conditions import benchmark_parser, spread, versions, write_results
from benchmarks.loops import LOG_EVERY_STEPS, LOOPS, OURS, Runner, Unavailable
from harness.config.loading import config_from_mapping
from harness.config.schema import Config


class Case(NamedTuple):
    """A network, its image size, n per worker, k per step, m per micro-batch."""

    model: str
    pixels: int
    worker_batch: int
    workers: int
    micro: int

    def __str__(self) -> str:
        images = self.worker_batch * self.workers
        return f"{self.model}, {images} images of {self.pixels} × {self.pixels}"


CPU_CASES = [
    Case("resnet8", 16, 32, 1, 1),  # about 7 ms per step: shows the overhead beside the network
    Case("resnet8", 16, 32, 8, 8),  # the quickstart's step
    Case("resnet20", 32, 128, 1, 1),
    Case("resnet50", 64, 32, 1, 1),
]
GPU_CASES = [
    Case("resnet20", 32, 128, 1, 1),  # bound by launching kernels
    Case("resnet20", 32, 128, 8, 8),
    Case("resnet50", 224, 32, 8, 8),
]
WARM_UP_STEPS = {"cpu": 3, "cuda": 30}


def case_config(
    model: str,
    pixels: int,
    worker_batch: int,
    workers: int,
    micro: int,
    precision: str = "float32",
    compile: bool = False,
) -> Config:
    """Return the config of a case, with so many steps that no epoch ends."""
    return config_from_mapping(
        {
            "expect": {"error": 100, "source": "no training"},
            "data": {
                "train_images": worker_batch * workers * 100_000,
                "val_images": 1,
                "classes": 10,
                "crop": pixels,
                "resize": pixels,
            },
            "model": {"name": model},
            "recipe": {
                "minibatch": worker_batch * workers,
                "worker_batch": worker_batch,
                "epochs": 90,
                "reference_minibatch": worker_batch * workers,
            },
            "run": {
                "micro_batch": worker_batch * micro,
                "precision": precision,
                "compile": compile,
                "log_every_steps": LOG_EVERY_STEPS,
                "checkpoint_every_minutes": 1e6,
            },
        },
        "benchmarks/step.py",
    )


class Rounds(NamedTuple):
    """Each loop's (wall seconds, processor seconds) of every block of `images` images."""

    images: int
    times: dict[str, list[tuple[float, float]]]
    absent: dict[str, str]


def alternate(case: Case, options: argparse.Namespace, first: int) -> Rounds:
    """Time alternating blocks of all loops, each in a new process; `first` is started first."""
    config = case_config(*case, options.precision, options.compile)
    names = list(LOOPS)[first % len(LOOPS) :] + list(LOOPS)[: first % len(LOOPS)]
    runners: dict[str, Runner] = {}
    absent = {}
    for name in names:
        try:
            runners[name] = Runner(name, config)
        except Unavailable as error:
            absent[name] = str(error)
    for runner in runners.values():
        runner.run(WARM_UP_STEPS["cuda" if torch.cuda.is_available() else "cpu"])
    slowest_s = max(runner.run(2)[0] / 2 for runner in runners.values())
    steps = max(round(options.block_seconds / slowest_s), 2)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    for repetition in range(options.repetitions):
        for name in list(runners)[:: -1 if repetition % 2 else 1]:
            times[name].append(runners[name].run(steps))
    for runner in runners.values():
        runner.end()
    return Rounds(steps * config.recipe.minibatch, times, absent)


def compare(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Return a row for each loop over all rounds, and why some did not run."""
    found = [alternate(case, options, first) for first in range(options.starts)]
    rows = [row(name, found) for name in LOOPS if name in found[0].times]
    return {"starts": options.starts, "loops": rows, "not_run": found[0].absent}


def row(name: str, found: Sequence[Rounds]) -> dict[str, Any]:
    """Return a loop's rate, and its times over the harness's in the same rounds."""
    pairs = [p for one in found for p in zip(one.times[name], one.times[OURS], strict=True)]
    rates = [one.images / seconds for one in found for seconds, _ in one.times[name]]
    return {
        "loop": name,
        "images_per_s": statistics.median(rates),
        "ratio": spread([their[0] / our[0] for their, our in pairs]),
        "ratio_processor_time": spread([their[1] / our[1] for their, our in pairs]),
    }


def print_case(title: str, result: dict[str, Any]) -> None:
    """Print a line for each loop."""

    def cell(value: dict[str, float]) -> str:
        quartiles = f"({value['quartile_1']:.3f}, {value['quartile_3']:.3f})"
        return f"{value['median']:8.3f} {quartiles}"

    print(f"{title}: harness / other   (quartiles)      in processor time        images/s")
    for line in result["loops"]:
        ratios = f"{cell(line['ratio'])}   {cell(line['ratio_processor_time'])}"
        print(f"  {line['loop']:14} {ratios}   {line['images_per_s']:10.0f}")
    for name, reason in result["not_run"].items():
        print(f"  {name:14} not run: {reason}")


def main() -> None:
    """Print a table; --write stores it in benchmarks/results/step.json."""
    cuda = torch.cuda.is_available()
    parser = benchmark_parser(__doc__, repetitions=10)
    parser.add_argument("--starts", type=int, default=3, help="starts of all processes; default 3")
    parser.add_argument("--block-seconds", type=float, default=0.5)
    parser.add_argument("--models", nargs="*", help="such as resnet8; all by default")
    parser.add_argument("--precision", default="bfloat16" if cuda else "float32")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=cuda,
        help="compile every loop's model; this project's also uses CUDA graphs, if that is faster",
    )
    options = parser.parse_args()
    cases = []
    for case in GPU_CASES if cuda else CPU_CASES:
        if options.models and case.model not in options.models:
            continue
        result = compare(case, options)
        print_case(str(case), result)
        cases.append({"case": str(case)} | case._asdict() | result)
    if options.write:
        about = {"precision": options.precision, "compile": options.compile}
        about["versions"] = versions("lightning", "accelerate")
        print(write_results("step", about | {"cases": cases}, options.write))


if __name__ == "__main__":
    main()
