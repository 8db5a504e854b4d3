"""The time from the command to the first step.

    python -m benchmarks.startup [--repetitions 6] [--write]

`harness train` on ResNet-50 and the digits: a new run, with `--resume` after a stop, and, if
`run.compile` is on (on a GPU, or with --compile), with an empty and a filled compile cache. Beside
it, what any training in PyTorch needs: importing torch and torchvision, and a bare loop's
first step on the same network and images in memory. On a CPU `run.compile` is off.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.conditions import benchmark_parser, spread, write_results
from harness.data.prepare.digits import prepare_digits

CONFIG = """
expect: {{error: 100, source: "a benchmark"}}
data: {{train_images: 1437, val_images: 360, classes: 10, crop: {size}, resize: {size}}}
model: {{name: {model}}}
recipe: {{minibatch: {minibatch}, worker_batch: 32, reference_minibatch: 256, epochs: 1000,
  milestones: []}}
run: {{data_root: {data}, loader: memory, log_every_steps: 1, keep_checkpoints: 2,
  evaluate_every_epochs: 995}}
"""
IMPORTS = "import torch, torchvision"
BARE = """
import torch
from benchmarks.loops import BARE, bare_loop, build
from benchmarks.loops import make_batches
from benchmarks.step import case_config
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
config = case_config("resnet50", 32, 32, 1, 1)
bare_loop(config, build(BARE, config, device), make_batches(config)[:1], device)
"""
NAMES = ["imports", "bare", "from nothing", "resumed"]
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def write_config(folder: Path, model: str, size: int, minibatch: int) -> Path:
    """Write a config on the digits that trains until it is stopped."""
    data = folder / "digits"
    if not data.exists():
        prepare_digits(data)
    path = folder / f"{model}.yaml"
    path.write_text(CONFIG.format(model=model, size=size, minibatch=minibatch, data=data))
    return path


def start(config: Path, out: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start `harness train` in its own process."""
    command = [sys.executable, "-m", "harness", "train", str(config), "--out", str(out)]
    return subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | environment,
    )


def step_lines(process: subprocess.Popen[str]) -> Iterator[int]:
    """Yield the number of each step as its line arrives."""
    assert process.stdout is not None
    for line in process.stdout:
        if "  step " in line:
            yield int(line.split("  step ")[1].split("/")[0])


def first_step_s(config: Path, out: Path, *arguments: str, **environment: str) -> float:
    """Return the time to the first step's line; then stop the run with a checkpoint."""
    begun_s = time.perf_counter()
    process = start(config, out, "--resume", *arguments, **environment)
    for _ in step_lines(process):
        seconds = time.perf_counter() - begun_s
        process.terminate()
        process.communicate(timeout=300)
        return seconds
    raise RuntimeError(f"harness train ended with code {process.wait()} before its first step")


def script_s(code: str) -> float:
    """Return the run time of a program in a fresh Python."""
    begun_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begun_s


def measure(repetitions: int, folder: Path, compile: bool) -> dict[str, list[float]]:
    """Return the seconds of each kind of start, in turn."""
    config = write_config(folder, "resnet50", 32, 32)
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    with_compile = ("cold compile cache", "warm compile cache") if compile else ()
    seconds |= {name: [] for name in with_compile}
    plain = "run.compile=false"
    for repetition in range(repetitions + 1):  # the first warms the system's file cache
        out, cache = folder / "run", folder / "cache"
        times = {"imports": script_s(IMPORTS), "bare": script_s(BARE)}
        shutil.rmtree(out, ignore_errors=True)
        times["from nothing"] = first_step_s(config, out, plain)
        times["resumed"] = first_step_s(config, out, plain)
        shutil.rmtree(cache, ignore_errors=True)
        for name in with_compile:
            shutil.rmtree(out)
            places = {variable: str(cache / variable) for variable in CACHES}
            times[name] = first_step_s(config, out, "run.compile=true", **places)
        for name, value in times.items():
            seconds[name] += [value] if repetition else []
    return seconds


def main() -> None:
    """Print a table; --write stores it in benchmarks/results/startup.json."""
    parser = benchmark_parser(__doc__, repetitions=6)
    parser.add_argument("--compile", action="store_true", help="compile on a CPU too")
    options = parser.parse_args()
    compile = options.compile or torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as name:
        seconds = measure(options.repetitions, Path(name), compile)
    rows: list[dict[str, Any]] = []
    for start_name, values in seconds.items():
        ratios = [value / bare for value, bare in zip(values, seconds["bare"], strict=True)]
        rows.append({"start": start_name, "seconds": spread(values), "cost_ratio": spread(ratios)})
        print(
            f"{start_name:20} {rows[-1]['seconds']['median']:6.2f} s   "
            f"{rows[-1]['cost_ratio']['median']:5.2f} of the bare loop's"
        )
    if not compile:
        print("compile caches: not run: run.compile is off on a CPU (--compile turns it on)")
    if options.write:
        print(write_results("startup", {"model": "resnet50", "rows": rows}, options.write))


if __name__ == "__main__":
    main()
