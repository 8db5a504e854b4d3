"""Images/s of the harness' training loop against others, alternating in the same process.

    python -m benchmarks.step [--processes 3] [--repetitions 10] [--block-seconds 0.5] [--write]

All train the same network from the same uint8 batches in memory, in the same precision, with the
same number of threads (`OMP_NUM_THREADS`); `loops.py` has the loops and says what each does beside
that. Each goes on in blocks of the same number of steps, forwards and backwards in turn. The figure
is the time of the other's block over that of the harness' in the same round (above 1: the harness
is faster), on the clock and in processor time. Rounds of several processes are taken together, as
where a process happens to have its memory favours one loop or another by some percent. On a CPU a
worker a step (k = m = 1), and the quickstart's 8; on a GPU 8 workers of 32 images, in bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from benchmarks.conditions import benchmark_parser, spread, timed, versions, write_results
from benchmarks.loops import LOG_EVERY_STEPS, LOOPS, OURS, Runner, Unavailable
from harness.config import Config, config_from_mapping
from harness.data.loader import Batch
from harness.step import set_precision


class Case(NamedTuple):
    """A network, its images, n of a worker, k of a step, m of a micro-batch."""

    model: str
    pixels: int
    worker_batch: int
    workers: int
    micro: int

    def __str__(self) -> str:
        images = self.worker_batch * self.workers
        return f"{self.model}, {images} images of {self.pixels} × {self.pixels}"


CPU_CASES = [
    Case("resnet8", 16, 32, 1, 1),  # about 7 ms a step: what a step costs beside the network
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
    """The config of a case, of so many steps that no epoch ends."""
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


def make_batches(config: Config) -> list[Batch]:
    """Eight micro-batches of random pixels, in pinned memory where there is a GPU."""
    generator = torch.Generator().manual_seed(0)
    size = int(config.run.micro_batch)
    shape = (size, config.data.crop, config.data.crop, 3)
    batches = []
    for _ in range(8):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, config.data.classes, (size,), generator=generator)
        batch = Batch(pixels.permute(0, 3, 1, 2), labels, torch.arange(size), [])
        batches.append(batch.pin_memory() if torch.cuda.is_available() else batch)
    return batches


def start(names: Sequence[str], config: Config) -> tuple[dict[str, Runner], dict[str, str]]:
    """The loops at their first step, and why the others do not run here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runners, absent = {}, {}
    for name in names:
        try:
            runners[name] = Runner(name, config, make_batches(config), device)
        except Unavailable as error:
            absent[name] = str(error)
    return runners, absent


class Rounds(NamedTuple):
    """Of each loop the (seconds, seconds of processor time) of its blocks, all of so many images;
    and why other loops did not run."""

    images: int
    times: dict[str, list[tuple[float, float]]]
    absent: dict[str, str]


def alternate(case: Case, options: argparse.Namespace) -> Rounds:
    """Alternating blocks of all loops, in this process."""
    set_precision(options.precision)
    config = case_config(*case, options.precision, options.compile)
    quiet = open(os.devnull, "w")  # noqa: SIM115 (their log lines are written, not shown)
    with contextlib.redirect_stdout(quiet):
        runners, absent = start(list(LOOPS), config)
        warm_up = WARM_UP_STEPS["cuda" if torch.cuda.is_available() else "cpu"]
        for runner in runners.values():
            runner.run(warm_up)
        slowest_s = max(timed(lambda r=r: r.run(2))[0] / 2 for r in runners.values())  # type: ignore[misc]
        steps = max(round(options.block_seconds / slowest_s), 2)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
        for repetition in range(options.repetitions):
            for name in list(runners)[:: -1 if repetition % 2 else 1]:
                times[name].append(timed(lambda name=name: runners[name].run(steps)))  # type: ignore[misc]
        for runner in runners.values():
            runner.end()
    return Rounds(steps * config.recipe.minibatch, times, absent)


def compare(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """A row for each loop, of the rounds of all processes; also why some did not run."""
    found = []
    for _ in range(options.processes):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found.append(pool.submit(alternate, case, options).result())
    rows = [row(name, found) for name in found[0].times]
    return {"processes": options.processes, "loops": rows, "not_run": found[0].absent}


def row(name: str, found: Sequence[Rounds]) -> dict[str, Any]:
    """A loop's rate, and its times over the harness' of the same rounds."""
    pairs = [p for one in found for p in zip(one.times[name], one.times[OURS], strict=True)]
    rates = [one.images / seconds for one in found for seconds, _ in one.times[name]]
    return {
        "loop": name,
        "images_per_s": statistics.median(rates),
        "ratio": spread([their[0] / our[0] for their, our in pairs]),
        "ratio_processor_time": spread([their[1] / our[1] for their, our in pairs]),
    }


def print_case(title: str, result: dict[str, Any]) -> None:
    """A line for each loop."""

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
    """Prints a table; --write keeps it in benchmarks/results/step.json."""
    cuda = torch.cuda.is_available()
    parser = benchmark_parser(__doc__, repetitions=10)
    parser.add_argument("--processes", type=int, default=3, help="default 3")
    parser.add_argument("--block-seconds", type=float, default=0.5)
    parser.add_argument("--models", nargs="*", help="such as resnet8; all by default")
    parser.add_argument("--precision", default="bfloat16" if cuda else "float32")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=cuda,
        help="every loop's model; this project's is replayed as CUDA graphs too, if that is faster",
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
