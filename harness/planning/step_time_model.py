"""The model of a step's time: compute, gradient buckets and their overlap, all-reduce, straggling.

Pure arithmetic in seconds and bytes; nothing is measured here. Section 4 of the paper says what
is modelled: gradients are summed as soon as they are ready, beside the backward pass, first inside
a node, then between nodes by recursive halving and doubling or a ring. A message of b bytes takes
latency + b / bandwidth (Thakur, Rabenseifner and Gropp, "Optimization of collective communication
operations in MPICH", 2005); summing the received numbers is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist
from typing import Literal

MIB = 2**20
FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 * MIB, 25 * MIB  # DDP's: the first starts the network early


@dataclass(frozen=True)
class Link:
    """What a message of b bytes takes: latency_s + b / bytes_per_s, in each direction at once."""

    latency_s: float
    bytes_per_s: float


def ring_s(count: float, ranks: int, link: Link, segments: int = 1) -> float:
    """A ring all-reduce of `count` bytes: 2(p - 1) steps, 2(p - 1)/p of the bytes (section 4).

    In each step a rank sends a p-th, in `segments` messages: while one is on its way, the next is
    sent, and what has come is passed on at once. Then latency shows only as far as it is longer
    than sending the others.
    """
    steps, sent_s = 2 * (ranks - 1), count / ranks / link.bytes_per_s
    if steps == 0:
        return 0.0
    step_s = max(sent_s, sent_s / segments + link.latency_s)
    return (steps - 1) * step_s + sent_s + link.latency_s


def halving_doubling_s(count: float, ranks: int, link: Link) -> float:
    """Recursive halving, then doubling, of `count` bytes: 2·log2(p) steps, 2(p - 1)/p of the bytes.

    Where p is no power of two, by binary blocks (section 4; Rabenseifner and Träff 2004): all
    blocks halve at once; then each of s ranks hands the next larger block its s-th part, as soon
    as it has that of the next smaller one. Doubling is the same in reverse.
    """
    ready_s = given_s = 0.0
    for size in [1 << bit for bit in range(ranks.bit_length()) if ranks >> bit & 1]:
        halving_s = (size.bit_length() - 1) * link.latency_s
        halving_s += (size - 1) / size * count / link.bytes_per_s
        ready_s = max(halving_s, given_s)
        given_s = ready_s + link.latency_s + count / size / link.bytes_per_s
    return 2 * ready_s


@dataclass(frozen=True)
class Network:
    """Nodes of `ranks_per_node` ranks. `inside`: a rank's link to its node; `between`: a node's to
    the others, all its interfaces together; `all_reduce_s`: what each all-reduce costs besides."""

    ranks_per_node: int
    inside: Link
    between: Link
    overhead_s: float = 0.0
    algorithm: Literal["ring", "halving_doubling", "faster"] = "faster"  # between nodes
    segments: int = 1  # of a ring's steps; Gloo: 2, NCCL pipelines too

    def all_reduce_s(self, count: float, ranks: int) -> float:
        """Seconds of an all-reduce of `count` bytes: reduced inside each node, summed between the
        nodes, handed back inside (section 4, phases 1 to 3)."""
        if ranks == 1:
            return 0.0
        local, nodes = min(ranks, self.ranks_per_node), -(-ranks // self.ranks_per_node)
        inside_s = ring_s(count, local, self.inside, self.segments)
        between_s = {
            "ring": ring_s(count, nodes, self.between, self.segments),
            "halving_doubling": halving_doubling_s(count, nodes, self.between),
        }
        if self.algorithm == "faster":  # as a library would choose
            return self.overhead_s + inside_s + min(between_s.values())
        return self.overhead_s + inside_s + between_s[self.algorithm]


@dataclass(frozen=True)
class Layer:
    """A parameter tensor's gradient, in bytes, and its share of the backward pass' time."""

    gradient_bytes: int
    backward_share: float


@dataclass(frozen=True)
class Bucket:
    """Gradients that are summed at once; `ready`: the share of the backward pass done by then."""

    count: float  # bytes
    ready: float


def fill_buckets(
    layers: Sequence[Layer],
    first_bytes: int = FIRST_BUCKET_BYTES,
    bucket_bytes: int = BUCKET_BYTES,
) -> list[Bucket]:
    """DDP's buckets after its first step: gradients in the order in which the backward pass makes
    them, the last of `layers` first; a bucket is closed by the gradient that fills it."""
    buckets: list[Bucket] = []
    count, done, limit = 0, 0.0, first_bytes
    for layer in reversed(layers):
        count, done = count + layer.gradient_bytes, done + layer.backward_share
        if count >= limit:
            buckets.append(Bucket(count, min(done, 1.0)))
            count, limit = 0, bucket_bytes
    return buckets + ([Bucket(count, 1.0)] if count else [])


def exposed_s(
    buckets: Sequence[Bucket], backward_s: float, all_reduce_s: Callable[[float], float]
) -> float:
    """Seconds from the end of the backward pass to the end of the last all-reduce.

    Buckets go one after the other, each from when it is ready; `all_reduce_s`: bytes -> seconds.
    """
    end_s = 0.0
    for bucket in buckets:
        end_s = max(end_s, bucket.ready * backward_s) + all_reduce_s(bucket.count)
    return max(end_s - backward_s, 0.0)


@cache
def expected_maximum(ranks: int) -> float:
    """The mean of the largest of `ranks` standard normal numbers: 0 for 1, 0.564 for 2."""
    normal, step = NormalDist(), 0.002
    # E[max] = ∫ (1 - Φ^W) over x > 0, minus ∫ Φ^W over x < 0; midpoints, to 9 σ
    points = [(i + 0.5) * step for i in range(4500)]
    above = sum(1 - normal.cdf(x) ** ranks for x in points)
    return (above - sum(normal.cdf(-x) ** ranks for x in points)) * step


@dataclass(frozen=True)
class Workload:
    """A rank's part of a step. `backward_s`: the backward pass of the last micro-batch, beside
    which gradients are summed (DDP's `no_sync` before it); part of `compute_s`.
    `spread`: the standard deviation of a rank's compute from step to step, as a share of it."""

    compute_s: float
    backward_s: float
    buckets: tuple[Bucket, ...]
    spread: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: the parts add up to `step_s`. `limit`: what takes the most of it."""

    compute_s: float
    straggling_s: float  # waiting for the slowest rank
    exposed_s: float  # communication that the backward pass does not hide
    limit: str

    @property
    def step_s(self) -> float:
        return self.compute_s + self.straggling_s + self.exposed_s


def step_time(work: Workload, network: Network, ranks: int) -> StepTime:
    """The predicted step on `ranks` ranks, each with this workload.

    Every rank waits for the slowest: independent normal compute times are assumed.
    """
    straggling_s = work.compute_s * work.spread * expected_maximum(ranks)
    exposed = _exposed(work, network, ranks)
    parts = {"compute": work.compute_s, "straggling": straggling_s, "": exposed}
    limit = max(parts, key=lambda name: parts[name])
    return StepTime(
        work.compute_s, straggling_s, exposed, limit or communication_limit(work, network, ranks)
    )


def _exposed(work: Workload, network: Network, ranks: int) -> float:
    return exposed_s(work.buckets, work.backward_s, lambda b: network.all_reduce_s(b, ranks))


def communication_limit(work: Workload, network: Network, ranks: int) -> str:
    """Which resource, were it free, would shorten the exposed communication the most."""
    inside, between = network.inside, network.between
    free = {
        "latency": replace(
            network,
            inside=replace(inside, latency_s=0.0),
            between=replace(between, latency_s=0.0),
            overhead_s=0.0,
        ),
        "bandwidth inside a node": replace(network, inside=replace(inside, bytes_per_s=math.inf)),
        "bandwidth between nodes": replace(network, between=replace(between, bytes_per_s=math.inf)),
    }
    return min(free, key=lambda name: _exposed(work, free[name], ranks))


def keeping_up_bytes_per_s(count: float, backward_s: float, nodes: int) -> float:
    """A node's least bandwidth at which `count` bytes are summed within the backward pass.

    Section 4's estimate: 2(p - 1)/p of the bytes, latency and what is ready too late not counted.
    """
    return 2 * (nodes - 1) / nodes * count / backward_s


def efficiency(alone_step_s: float, step_s: float) -> float:
    """Weak scaling: each rank's images/s, as a share of what it does without the others."""
    return alone_step_s / step_s
