"""The conditions of every benchmark's figures (hardware, versions, commit, spread), and --write."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from harness.errors import UserError
from harness.output_file import check_output, write_output
from harness.runs.environment import git_commit

RESULTS = Path(__file__).parent / "results"


def conditions() -> dict[str, Any]:
    """Return hardware, versions and commit (None without git) of this run."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": git_commit(Path(__file__).parent),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles and extremes."""
    low, median, high = statistics.quantiles(values, n=4)
    return {
        "median": median,
        "quartile_1": low,
        "quartile_3": high,
        "min": min(values),
        "max": max(values),
        "repetitions": len(values),
    }


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of the compared packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def resident_mb(field: str) -> float:
    """Return this process's VmRSS, or VmHWM for the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Return wall seconds, and processor seconds of all threads of this process.

    The first include the device's work. The second exclude other load on the
    machine, except for its effect on shared caches.
    """
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun_s, time.process_time() - begun_cpu_s


def benchmark_parser(documentation: str | None, repetitions: int) -> argparse.ArgumentParser:
    """Add the options of all benchmarks: --repetitions and --write."""
    parser = argparse.ArgumentParser(description=(documentation or "").splitlines()[0])
    parser.add_argument("--repetitions", type=at_least_two, default=repetitions)
    parser.add_argument(
        "--write",
        nargs="?",
        type=results_folder,
        const=RESULTS,
        metavar="FOLDER",
        help="store the figures as JSON in FOLDER (benchmarks/results, the committed ones)",
    )
    return parser


def results_folder(text: str) -> Path:
    """Return the folder of --write, creating it if missing; refuse it before anything runs."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_output(folder / "probe.json", "--write")
    except (OSError, UserError) as error:
        raise argparse.ArgumentTypeError(f"{text}: cannot be written: {error}") from None
    return folder


def at_least_two(text: str) -> int:
    """Parse a number of repetitions: one has no spread."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: give 2 or more, since one has no spread")
    return int(text)


def write_results(name: str, content: dict[str, Any], folder: Path | None = None) -> Path:
    """Write FOLDER/NAME.json, by default in benchmarks/results/."""
    path = (folder or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(conditions() | content, indent=2) + "\n"
    write_output(path, "--write", text)
    return path
