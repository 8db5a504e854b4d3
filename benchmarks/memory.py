"""Peak memory of a rank, compared with that of a bare PyTorch loop.

    python -m benchmarks.memory [--repetitions 5] [--[no-]compile] [--write]

Each loop of `loops.py` trains a few steps in a fresh process. The figure is, on a GPU, the peak of
PyTorch's allocator; on a CPU, the peak resident memory minus that after the imports (all loops'
imports, the same for all). Models and batches are those of `step.py`, and models are compiled
(and this project's replayed as CUDA graphs) as in runs: on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import os
from collections.abc import Sequence
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.conditions import benchmark_parser, resident_mb, spread, versions, write_results
from benchmarks.loops import BARE, LOOPS, Unavailable, build, make_batches
from benchmarks.step import Case, case_config
from harness.execution.precision import set_precision

CPU_CASES = [Case("resnet20", 32, 128, 1, 1), Case("resnet50", 64, 32, 1, 1)]
GPU_CASES = [Case("resnet50", 224, 32, 8, 8)]
STEPS = 5
IMPORTED = ("accelerate", "lightning", "torch.utils.tensorboard")  # before a loop begins


def peak_mb(name: str, case: Case, precision: str, compile: bool) -> float | str:
    """Return one loop's memory, called in a fresh process, or why it cannot run."""
    torch.set_num_threads(1)
    set_precision(precision)
    config = case_config(*case, precision, compile)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for module in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    batches = make_batches(config)
    before_mb = resident_mb("VmRSS")
    quiet = open(os.devnull, "w")  # noqa: SIM115
    with contextlib.redirect_stdout(quiet):
        try:
            endless = itertools.islice(itertools.cycle(batches), STEPS)
            LOOPS[name](config, build(name, config, device), endless, device)
        except Unavailable as error:
            return str(error)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resident_mb("VmHWM") - before_mb


def measure(
    case: Case, names: Sequence[str], precision: str, compile: bool, repetitions: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return a row for each loop, and why the others did not run."""
    peaks: dict[str, list[float]] = {name: [] for name in names}
    absent: dict[str, str] = {}
    for _ in range(repetitions):
        for name in [name for name in names if name not in absent]:
            with get_context("spawn").Pool(1) as pool:
                peak = pool.apply(peak_mb, (name, case, precision, compile))
            if isinstance(peak, str):
                absent[name] = peak
            else:
                peaks[name].append(peak)
    rows = []
    for name in [name for name in names if name not in absent]:
        ratios = [peak / bare for peak, bare in zip(peaks[name], peaks[BARE], strict=True)]
        rows.append({"loop": name, "peak_mb": spread(peaks[name]), "cost_ratio": spread(ratios)})
    return rows, absent


def main() -> None:
    """Print a table; --write stores it in benchmarks/results/memory.json."""
    cuda = torch.cuda.is_available()
    parser = benchmark_parser(__doc__, repetitions=5)
    parser.add_argument("--precision", default="bfloat16" if cuda else "float32")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=cuda,
        help="compile every loop's model; this project's also uses CUDA graphs, if that is faster",
    )
    options = parser.parse_args()
    how = options.precision, options.compile
    cases = []
    for case in GPU_CASES if cuda else CPU_CASES:
        rows, absent = measure(case, list(LOOPS), *how, options.repetitions)
        print(f"{case}: peak MB, and relative to the bare loop's")
        for row in rows:
            ratio = row["cost_ratio"]
            print(
                f"  {row['loop']:14} {row['peak_mb']['median']:8.1f}   {ratio['median']:.3f} "
                f"({ratio['quartile_1']:.3f}, {ratio['quartile_3']:.3f})"
            )
        for name, reason in absent.items():
            print(f"  {name:14} not run: {reason}")
        cases.append({"case": str(case), "loops": rows, "not_run": absent})
    if options.write:
        about = {"precision": options.precision, "compile": options.compile}
        about["versions"] = versions("lightning", "accelerate")
        print(write_results("memory", about | {"cases": cases}, options.write))


if __name__ == "__main__":
    main()
