"""Weak and strong scaling over ranks, and over hosts with slow links, compared with the model.

    python -m benchmarks.scaling [--config CONFIG] [--repetitions 5] [--block-seconds 2] [--write]
    python -m benchmarks.scaling --measured FILE.json      # scaling_rank's results on a cluster

One machine: torchrun starts one rank per GPU (or core), and scaling_rank measures the step on 1, 2,
4, … of them. Hosts: four network namespaces with shaped links, Gloo, real gradients through DDP;
they outnumber the cores, so the compute of a step is a timed wait. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import hosts
from benchmarks.conditions import benchmark_parser, write_results
from benchmarks.scaling_model import judge
from benchmarks.scaling_plot import draw
from benchmarks.scaling_rank import BUCKET_BYTES, GRADIENT_BYTES, WAIT_S
from harness.planning.step_time_model import efficiency

CONFIG = "configs/quickstart.yaml"
SPEEDS = (10.0, 30.0, 100.0, 300.0, 1000.0)  # Mbit/s
DELAYED, DELAYED_SPEEDS = 5.0, (30.0, 100.0)  # ms; a switch in Python forwards no faster
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
PORT = "29500"  # in a host's own network


def measure_machine(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Measure weak and strong scaling over this machine's GPUs, or cores, with torchrun."""
    ranks = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    out = folder / "machine.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, "-m", "benchmarks.scaling_rank", *options.config]
    subprocess.run(
        [*command, *_measuring(options, out)], check=True, env={**ONE_THREAD, **os.environ}
    )
    return list(json.loads(out.read_text())["points"])


def _measuring(options: argparse.Namespace, out: Path) -> list[str]:
    repetitions = ["--repetitions", str(options.repetitions)]
    return [*repetitions, "--block-seconds", str(options.block_seconds), "--out", str(out)]


def measure_hosts(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Measure the waits on 2, 3, … hosts, at each link speed, with and without a delay.

    Raises RuntimeError if a rank fails.
    """
    points: list[dict[str, Any]] = []
    for delay_ms, speeds in ((0.0, SPEEDS), (DELAYED, DELAYED_SPEEDS)):
        out = folder / f"hosts-{delay_ms:g}.json"
        counts = [str(count) for count in range(2, options.hosts + 1)]
        command = [sys.executable, "-m", "benchmarks.scaling_rank", "--waits", "--ranks", *counts]
        command += ["--mbit-per-s", *map(str, speeds), "--delay-ms", str(delay_ms)]
        with hosts.Hosts(options.hosts, delay_ms) as network:
            ranks = [
                network.start(
                    rank,
                    [*command, *_measuring(options, out)],
                    ONE_THREAD | place(network, rank, options.hosts),
                )
                for rank in range(options.hosts)
            ]
            if any(codes := [rank.wait() for rank in ranks]):
                raise RuntimeError(f"hosts: exit codes {codes}")
        points += json.loads(out.read_text())["points"]
    return points


def place(network: hosts.Hosts, rank: int, world_size: int) -> dict[str, str]:
    """Return the environment of a rank on its own host."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": network.address(0),
        "MASTER_PORT": PORT,
        "GLOO_SOCKET_IFNAME": hosts.INTERFACE,
    }


def add_efficiency(points: Sequence[dict[str, Any]]) -> None:
    """Add the efficiency to each point: a rank's images/s, relative to a single rank's.

    Weak scaling: one rank's step with the same images; strong: its images/s with the minibatch.
    """
    ones = {point["scaling"]: point for point in points if point["ranks"] == 1}
    for point in points:
        one = ones[point["scaling"]]
        share = point["images"] / one["images"] / point["ranks"]
        alone_s = share * one["step_s"]["median"]
        point["efficiency"] = efficiency(alone_s, point["step_s"]["median"])


def print_machine(points: Sequence[dict[str, Any]]) -> None:
    """Print a row for each point of a network."""
    print("scaling  ranks  images   ms per step (quartiles) exposed, ms   images/s  efficiency")
    for point in points:
        step, exposed = point["step_s"], point["exposed_s"]
        quartiles = f"({1e3 * step['quartile_1']:.1f}, {1e3 * step['quartile_3']:.1f})"
        print(
            f"{point['scaling']:7}  {point['ranks']:5}  {point['images']:6}  "
            f"{1e3 * step['median']:9.1f} {quartiles:15} {1e3 * exposed['median']:12.1f}  "
            f"{point['images_per_s']:9.0f}  {point['efficiency']:10.3f}"
        )


def print_hosts(judged: dict[str, Any], points: Sequence[dict[str, Any]]) -> None:
    """Print a row for each point of the hosts, with the model's prediction and its error."""
    print(
        f"\nhosts: compute is a timed wait of {1e3 * WAIT_S:.0f} ms; gradients "
        f"{GRADIENT_BYTES / 2**20:g} MiB in buckets of {BUCKET_BYTES / 2**20:g} MiB, Gloo\n"
        "hosts  Mbit/s  delay   ms per step (quartiles) wait, ms  exposed, ms  efficiency  "
        "predicted  error"
    )
    for row, point in zip(judged["predictions"], points, strict=True):
        step, alone_s = point["step_s"], point["alone_s"]["median"]
        quartiles = f"({1e3 * step['quartile_1']:.0f}, {1e3 * step['quartile_3']:.0f})"
        print(
            f"{row['ranks']:5}  {row['mbit_per_s']:6.0f}  {row['delay_ms']:5.0f}  "
            f"{1e3 * step['median']:9.0f} {quartiles:15} {1e3 * alone_s:7.0f}  "
            f"{1e3 * point['exposed_s']['median']:11.0f}  {alone_s / step['median']:10.3f}  "
            f"{1e3 * row['predicted_step_s']:9.0f}  {row['error_percent']:+5.1f} %"
            + ("" if row["held_out"] else "  fitted")
        )
    fitted = judged["fitted"]
    print(
        f"fitted: {1e3 * fitted['latency_s']:.2f} ms per ring step, {fitted['rate']:.3f} of the "
        f"set rate, {1e3 * fitted['overhead_s']:.2f} ms per all-reduce\n"
        f"median error of the held-out points: step {judged['median_error_percent']:.1f} %, "
        f"exposed communication {judged['median_exposed_error_percent']:.1f} %"
    )


def main() -> None:
    """Print the tables; --write stores them in benchmarks/results/scaling.json and draws them."""
    parser = benchmark_parser(__doc__, repetitions=5)
    parser.add_argument("--config", nargs="+", default=[CONFIG], metavar="CONFIG [key=value …]")
    parser.add_argument("--measured", type=Path, metavar="FILE.json", help="measure nothing")
    parser.add_argument("--hosts", type=int, default=4, help="default 4; 0 for none")
    parser.add_argument("--block-seconds", type=float, default=2.0)
    options = parser.parse_args()
    found = json.loads(options.measured.read_text()) if options.measured else measure(options)
    add_efficiency(found["points"])
    print_machine(found["points"])
    if "hosts" in found:
        found["model"] = judge(found["hosts"])
        print_hosts(found["model"], found["hosts"])
    if options.write:
        path = write_results("scaling", found, options.write)
        print(path, draw(found, path.with_suffix(".svg")))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure `points` of this machine and, if possible, its `hosts`."""
    found: dict[str, Any] = {"config": options.config, "load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        found["points"] = measure_machine(options, Path(folder))
        if options.hosts and (reason := hosts.missing()):
            print(f"hosts: not measured: {reason}")
        elif options.hosts:
            found["hosts"] = measure_hosts(options, Path(folder))
    return found


if __name__ == "__main__":
    main()
