"""Run the preflight on the ranks of a launch."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from harness.distributed import World, process_group, world_from_environment
from harness.preflight.figures import LIMITS, Problem, RankFigures, find_problems, values_of
from harness.preflight.links import AllReduce, measure_all_reduce, measure_clock, measure_ring
from harness.preflight.machine import (
    data_identity,
    measure_by_programs,
    measure_compute,
    measure_memory,
    measure_reading,
    measure_writing,
)
from harness.rendezvous import rendezvous
from harness.runs.environment import code_digest, versions

TIMEOUT_S = 60.0
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Preflight:
    """What all ranks measured, and the nodes that fall short."""

    ranks: Sequence[RankFigures]
    problems: Sequence[Problem]
    all_reduce: AllReduce | None = None  # None for a single rank

    @property
    def bad_nodes(self) -> list[str]:
        return list(dict.fromkeys(problem.node for problem in self.problems))

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"bad_nodes": self.bad_nodes}


def run_preflight(device: str, data: Path | None, folder: Path | None) -> Preflight:
    """Measure on all ranks that the environment names; return the same on all of them.

    `device` is as `run.device`, `data` the images, `folder` where run folders are written. Raises
    UserError and RunFailed where the ranks do not meet.
    """
    world = world_from_environment(device)
    store = rendezvous(world, TIMEOUT_S)
    with process_group(world, store, TIMEOUT_S) as control:
        figures = measure_compute(world.device) | measure_memory()
        equal = _versions()
        if world.local_rank == 0:
            theirs, their_equal = _measure_files(world, data, folder)
            figures, equal = figures | theirs, equal | their_equal
            if world.device.type == "cuda":
                figures |= measure_by_programs(world.local_world_size)
        if control is not None:
            figures |= measure_clock(world, control) | measure_ring(world, control)
        own = RankFigures(world.rank, _node(), figures, equal)
        ranks = _gather(own, world, control)
        if control is None:
            return Preflight(ranks, find_problems(ranks))
        names = "latency to the next rank", "sending to the next rank"
        links = [(rank.figures[names[0]], rank.figures[names[1]]) for rank in ranks]
        return Preflight(ranks, find_problems(ranks), measure_all_reduce(world, control, links))


def _versions() -> dict[str, str]:
    driver = DRIVER.read_text().splitlines()[0] if DRIVER.exists() else "none"
    found = versions()
    return {
        "torch": str(found["torch"]),
        "python": str(found["python"]),
        "code of the harness": code_digest()[:12],
        "GPU driver": driver,
    }


def _measure_files(
    world: World, data: Path | None, folder: Path | None
) -> tuple[dict[str, float], dict[str, str]]:
    """Measure a node's access to files, by one of its ranks."""
    figures: dict[str, float] = {}
    equal: dict[str, str] = {}
    if data is not None:
        try:
            figures |= measure_reading(data)
            equal["data set"] = data_identity(data) if data.is_dir() else f"no folder {data}"
        except OSError as error:
            equal["data set"] = f"{error.filename}: {error.strerror}"
    if folder is not None:
        try:
            figures |= measure_writing(folder, world.rank)
        except OSError as error:
            equal["run folder"] = f"{folder}: {error.strerror}"
        else:
            equal["run folder"] = "writable"
    return figures, equal


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _gather(own: RankFigures, world: World, control: dist.ProcessGroup | None) -> list[RankFigures]:
    if control is None:
        return [own]
    found: list[RankFigures | None] = [None] * world.world_size
    dist.all_gather_object(found, own, group=control)
    return [figures for figures in found if figures is not None]


def render(result: Preflight) -> str:
    """Return the figures as a table, and below it each node that falls short."""
    rows = [["", "median", "worst", "limit"]]
    for name, limit in LIMITS.items():
        if values := sorted(values_of(name, result.ranks)):
            worst = values[0] if limit.at_least else values[-1]
            shown = (values[len(values) // 2], worst, limit.threshold(values))
            rows.append([f"{name} ({limit.unit})", *(f"{value:.3g}" for value in shown)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if (whole := result.all_reduce) is not None:
        lines.append(
            f"all-reduce of {whole.bytes / 2**20:.0f} MiB: {1e3 * whole.measured_s:.1f} ms "
            f"({whole.bus_mb_s:.0f} MB/s), predicted from the ring's links "
            f"{1e3 * whole.predicted_s:.1f} ms; of one number: {1e3 * whole.smallest_s:.2f} ms"
        )
    nodes = len({rank.node for rank in result.ranks})
    healthy = nodes - len(result.bad_nodes)
    lines.append(f"{healthy} of {nodes} nodes are healthy ({len(result.ranks)} ranks)")
    return "\n".join(lines)
