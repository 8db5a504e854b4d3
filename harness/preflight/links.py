"""Measurements between ranks: the links of the ring, the whole all-reduce, clocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from harness.distributed import World
from harness.planning.step_time_model import Link, ring_s

MESSAGE_BYTES, REDUCED_BYTES = 8 * 2**20, 16 * 2**20
REPEATS = 4


@dataclass(frozen=True)
class AllReduce:
    """A whole all-reduce, in seconds, beside what the model predicts of the slowest link."""

    bytes: int
    measured_s: float
    predicted_s: float
    smallest_s: float  # of one number: its latency

    @property
    def bus_mb_s(self) -> float:
        """Return the bytes per second that each rank sends, in MB/s."""
        return self.bytes / self.measured_s / 1e6


def measure_ring(world: World, control: dist.ProcessGroup) -> dict[str, float]:
    """Measure the link from each rank to the next, one link at a time."""
    figures: dict[str, float] = {}
    for sender in range(world.world_size):
        dist.barrier(control)
        receiver = (sender + 1) % world.world_size
        if world.rank == sender:
            small_s = _round_trip_s(world.device, 8, receiver)
            large_s = _round_trip_s(world.device, MESSAGE_BYTES, receiver)
            figures["latency to the next rank"] = 1e3 * small_s / 2
            figures["sending to the next rank"] = MESSAGE_BYTES / large_s / 1e6
        elif world.rank == receiver:
            for count in (8, MESSAGE_BYTES):
                _answer(world.device, count, sender)
    return figures


def _round_trip_s(device: torch.device, count: int, receiver: int) -> float:
    """Return the least seconds from sending `count` bytes to a short answer."""
    message, answer = (torch.zeros(n, dtype=torch.uint8, device=device) for n in (count, 1))

    def exchange() -> None:
        dist.send(message, receiver)
        dist.recv(answer, receiver)

    return min(_seconds(exchange, device) for _ in range(REPEATS))


def _answer(device: torch.device, count: int, sender: int) -> None:
    message, answer = (torch.zeros(n, dtype=torch.uint8, device=device) for n in (count, 1))
    for _ in range(REPEATS):
        dist.recv(message, sender)
        dist.send(answer, sender)


def measure_all_reduce(
    world: World, control: dist.ProcessGroup, links: Sequence[tuple[float, float]]
) -> AllReduce:
    """Measure all-reduces over all ranks; `links` are (latency in ms, MB/s) along the ring."""
    large = torch.zeros(REDUCED_BYTES // 4, device=world.device)
    small = torch.zeros(1, device=world.device)
    measured_s, smallest_s = (_all_reduce_s(tensor, control) for tensor in (large, small))
    slowest = Link(max(latency for latency, _ in links) / 1e3, min(rate for _, rate in links) * 1e6)
    segments = 1 if world.device.type == "cuda" else 2
    predicted_s = ring_s(REDUCED_BYTES, world.world_size, slowest, segments)
    return AllReduce(REDUCED_BYTES, measured_s, predicted_s, smallest_s)


def _all_reduce_s(tensor: torch.Tensor, control: dist.ProcessGroup) -> float:
    times = []
    for _ in range(REPEATS):
        dist.barrier(control)
        times.append(_seconds(lambda: dist.all_reduce(tensor), tensor.device))
    return min(times)


def measure_clock(world: World, control: dist.ProcessGroup) -> dict[str, float]:
    """Compare each rank's clock with rank 0's, by the exchange with the shortest round trip.

    Half of the round trip is in doubt, and is counted in the clock's favour.
    """
    figures: dict[str, float] = {}
    for rank in range(1, world.world_size):
        dist.barrier(control)
        if world.rank == 0:
            for _ in range(REPEATS):
                theirs = torch.zeros(1, dtype=torch.float64)
                dist.recv(theirs, rank, group=control)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), rank, group=control)
        elif world.rank == rank:
            offset_s = _offset_s(control)
            figures = {"clock ahead of rank 0's": offset_s, "clock behind rank 0's": -offset_s}
    return {name: value if value > 0 else 0.0 for name, value in figures.items()}


def _offset_s(control: dist.ProcessGroup) -> float:
    found = []
    for _ in range(REPEATS):
        began_s, began = time.monotonic(), time.time()
        dist.send(torch.zeros(1, dtype=torch.float64), 0, group=control)
        theirs = torch.zeros(1, dtype=torch.float64)
        dist.recv(theirs, 0, group=control)
        half_s = (time.monotonic() - began_s) / 2
        found.append((half_s, began + half_s - theirs.item()))
    half_s, offset_s = min(found)
    sign = 1 if offset_s > 0 else -1
    return sign * max(abs(offset_s) - half_s, 0.0)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    began_s = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began_s
