"""The cost of exact sums: time and memory of a step against fast ones, and bytes between hosts.

    OMP_NUM_THREADS=1 python -m benchmarks.exact [--repetitions 15] [--hosts 4] [--write]

On one rank, a step with fast sums, at the fastest micro-batch, alternates with the same step with
exact sums in units of 1, 2 and 4 workers; `cost_ratio` is the exact step's time over the fast one's
in the same round. Memory is the peak resident memory of a fresh process, minus that after the
imports. Hosts are those of `benchmarks.scaling`, with links shaped to each speed: their ranks
alternate steps of both kinds, and each interface counts the bytes that it sends.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import hosts
from benchmarks.conditions import benchmark_parser, resident_mb, spread, timed, write_results
from benchmarks.scaling import ONE_THREAD, place
from benchmarks.scaling_rank import random_batches
from benchmarks.step import case_config
from harness.config.schema import Config
from harness.data.batch import Batch
from harness.distributed import World, world_from_environment
from harness.execution.determinism import threads_and_determinism
from harness.models.registry import build_model
from harness.recipe.minibatch import Minibatch
from harness.training.replica import Replica
from harness.training.step import Step
from harness.training.tuning.malloc import keep_freed_memory
from harness.training.tuning.micro_batch import fastest_micro_batch

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, "alone", CPU)
UNITS = 1, 2, 4  # workers
WARM_UP_STEPS = 2
MBIT_PER_S = 100.0, 400.0, 1000.0


class Case(NamedTuple):
    """A network, its image size, n and k."""

    model: str
    pixels: int
    worker_batch: int
    workers: int

    def __str__(self) -> str:
        return f"{self.model}, {self.workers} workers of {self.worker_batch} × {self.pixels}²"


CASES = [Case("resnet8", 16, 32, 8), Case("resnet20", 32, 32, 8), Case("resnet50", 64, 32, 4)]
HOSTS_CASE = Case("resnet20", 16, 8, 12)  # 1.1 MB of gradients, and units for 2, 3 and 4 hosts


def config_of(case: Case, **run: object) -> Config:
    """Return the case's config; `run` changes its keys of that section."""
    config = case_config(*case, micro=case.workers)
    return config.model_copy(update={"run": config.run.model_copy(update={"sums": "fast", **run})})


def exact_config(case: Case, unit_workers: int) -> Config:
    """Return the case's config with exact sums."""
    images = unit_workers * case.worker_batch
    return config_of(case, sums="exact", unit_workers=unit_workers, micro_batch=images)


def fast_config(case: Case) -> Config:
    """Return the case's config with fast sums, at the micro-batch that is fastest on one rank."""
    config = config_of(case)
    replica = Replica(config, build_model(config), ALONE)
    size = fastest_micro_batch(replica, Minibatch.of(config), 1, None, lambda images: None)
    return config_of(case, micro_batch=size)


class Steps:
    """Steps of one config on this rank, from batches in memory."""

    def __init__(self, config: Config, world: World = ALONE) -> None:
        minibatch = Minibatch.of(config)
        passes = minibatch.micro_batches(world.rank, world.world_size, int(config.run.micro_batch))
        self.config, self.world, self.done = config, world, 0
        self.step = Step(config, Replica(config, build_model(config), world), passes)
        sizes = [len(workers) * minibatch.worker_batch for workers in passes]
        self.batches: Iterator[Batch] = random_batches(config, sizes)

    def __call__(self, steps: int = 1) -> None:
        with threads_and_determinism(self.config.run, self.world.device):
            for _ in range(steps):
                self.step(self.done, self.batches)
                self.done += 1
            self.step.metrics.read()


def measure_time(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Alternate steps of both kinds on one rank."""
    fast = fast_config(case)
    units = [unit for unit in UNITS if case.workers % unit == 0]
    steps = {0: Steps(fast)} | {unit: Steps(exact_config(case, unit)) for unit in units}
    for kind in steps.values():
        kind(WARM_UP_STEPS)
    count = max(round(options.block_seconds / timed(steps[0])[0]), 1)
    times: dict[int, list[float]] = {unit: [] for unit in steps}
    for repetition in range(options.repetitions):
        for unit in list(steps)[:: -1 if repetition % 2 else 1]:
            times[unit].append(timed(partial(steps[unit], count))[0] / count)
    return {
        "fast_micro_batch": fast.run.micro_batch,
        "fast_ms": spread([1000 * s for s in times[0]]),
        "units": [
            {
                "unit_workers": unit,
                "ms": spread([1000 * s for s in times[unit]]),
                "cost_ratio": spread([a / b for a, b in zip(times[unit], times[0], strict=True)]),
            }
            for unit in units
        ],
    }


def peak_mb(config: Config) -> float:
    """Return the memory of a few steps, in the fresh process that calls this."""
    torch.set_num_threads(1)
    keep_freed_memory()
    before_mb = resident_mb("VmRSS")
    Steps(config)(3)
    return resident_mb("VmHWM") - before_mb


def measure_memory(case: Case, fast_micro_batch: int) -> dict[str, float]:
    """Return the peak of fast sums and of exact ones in units of one worker, median of three."""
    configs = config_of(case, micro_batch=fast_micro_batch), exact_config(case, 1)
    peaks = []
    for config in configs:
        found = []
        for _ in range(3):
            with get_context("spawn").Pool(1) as pool:
                found.append(pool.apply(peak_mb, (config,)))
        peaks.append(sorted(found)[1])
    return {"fast_mb": peaks[0], "exact_mb": peaks[1], "cost_ratio": peaks[1] / peaks[0]}


def sent_bytes() -> int:
    """Return the bytes that this host's interface has sent."""
    return int(Path(f"/sys/class/net/{hosts.INTERFACE}/statistics/tx_bytes").read_text())


def measure_as_host(options: argparse.Namespace) -> None:
    """Measure on this host, one of those that the environment names; rank 0 writes --out."""
    torch.set_num_threads(1)
    world = world_from_environment("cpu")
    torch.distributed.init_process_group("gloo")
    kinds = {
        "fast": Steps(config_of(HOSTS_CASE, micro_batch=HOSTS_CASE.worker_batch), world),
        "exact": Steps(exact_config(HOSTS_CASE, 1), world),
    }
    rows = []
    for mbit_per_s in MBIT_PER_S:
        hosts.shape_this_host(mbit_per_s)
        for steps in kinds.values():
            steps(WARM_UP_STEPS)
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        sent: dict[str, int] = {}
        for _ in range(options.repetitions):
            for kind, steps in kinds.items():
                torch.distributed.barrier()
                before = sent_bytes()
                seconds[kind].append(timed(steps)[0])
                sent[kind] = sent_bytes() - before
        row: dict[str, Any] = {"hosts": world.world_size, "mbit_per_s": mbit_per_s}
        row |= {f"{kind}_ms": spread([1000 * s for s in seconds[kind]]) for kind in kinds}
        row |= {f"{kind}_sent_bytes_a_step": count for kind, count in sent.items()}
        pairs = zip(seconds["exact"], seconds["fast"], strict=True)
        rows.append(row | {"cost_ratio": spread([a / b for a, b in pairs])})
    if world.rank == 0:
        options.out.write_text(json.dumps(rows))
    torch.distributed.destroy_process_group()


def measure_hosts(count: int, repetitions: int) -> list[dict[str, Any]]:
    """Measure `count` hosts with shaped links."""
    with tempfile.TemporaryDirectory() as folder, hosts.Hosts(count) as network:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.exact", "--as-host", "--out", str(out)]
        command += ["--repetitions", str(repetitions)]
        processes = [
            network.start(rank, command, ONE_THREAD | place(network, rank, count))
            for rank in range(count)
        ]
        if any(codes := [process.wait() for process in processes]):
            raise RuntimeError(f"hosts: exit codes {codes}")
        rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


def print_case(result: dict[str, Any]) -> None:
    """Print the rows of one case."""
    fast, memory = result["fast_ms"]["median"], result["memory"]
    print(f"{result['case']}: fast {fast:.1f} ms, micro-batch {result['fast_micro_batch']}")
    for row in result["units"]:
        ratio = row["cost_ratio"]
        quartiles = f"({ratio['quartile_1']:.3f}, {ratio['quartile_3']:.3f})"
        print(f"  units of {row['unit_workers']}: {ratio['median']:.3f} {quartiles}")
    print(f"  memory: {memory['cost_ratio']:.3f} of {memory['fast_mb']:.0f} MB")


def print_host(row: dict[str, Any]) -> None:
    """Print one row of the hosts."""
    ratio, mb = row["cost_ratio"], [row[f"{k}_sent_bytes_a_step"] / 1e6 for k in ("fast", "exact")]
    print(
        f"{row['hosts']} hosts, {row['mbit_per_s']:5g} Mbit/s: {row['exact_ms']['median']:.1f} ms "
        f"against {row['fast_ms']['median']:.1f}, {ratio['median']:.3f} ({ratio['quartile_1']:.3f}"
        f", {ratio['quartile_3']:.3f}); rank 0 sends {mb[1]:.2f} MB against {mb[0]:.2f}"
    )


def main() -> None:
    """Print a table; --write stores it in benchmarks/results/exact.json."""
    parser = benchmark_parser(__doc__, repetitions=15)
    parser.add_argument("--block-seconds", type=float, default=0.5)
    parser.add_argument("--hosts", type=int, default=4, help="default 4; 0 for none")
    parser.add_argument("--models", nargs="*", help="such as resnet8; all by default")
    parser.add_argument("--as-host", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_host:
        measure_as_host(options)
        return
    cases, rows = [], []
    for case in [case for case in CASES if not options.models or case.model in options.models]:
        result = {"case": str(case)} | case._asdict() | measure_time(case, options)
        result["memory"] = measure_memory(case, result["fast_micro_batch"])
        print_case(result)
        cases.append(result)
    reason = hosts.missing() if options.hosts else "not asked for"
    for count in range(2, options.hosts + 1) if not reason else ():
        rows += measure_hosts(count, options.repetitions)
        for row in rows[-len(MBIT_PER_S) :]:
            print_host(row)
    if reason:
        print(f"hosts: not measured: {reason}")
    if options.write:
        print(write_results("exact", {"cases": cases, "hosts": rows}, options.write))


if __name__ == "__main__":
    main()
