"""A model of the step time: compute, gradient buckets and their overlap, all-reduce, straggling.

It is pure arithmetic in seconds and bytes; nothing is measured here. It models section 4 of the
paper: gradients are summed as soon as they are ready, during the backward pass, first inside a
node, then between nodes by recursive halving and doubling or by a ring. A message of b bytes takes
latency + b / bandwidth (Thakur, Rabenseifner and Gropp, "Optimization of collective communication
operations in MPICH", 2005); the additions themselves are not counted.
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
    """A link on which b bytes take latency_s + b / bytes_per_s, in both directions at a time."""

    latency_s: float
    bytes_per_s: float


def ring_s(count: float, ranks: int, link: Link, segments: int = 1) -> float:
    """Return the seconds of a ring all-reduce: 2(p - 1) steps, 2(p - 1)/p of the bytes (section 4).

    In each step a rank sends a p-th of the `count` bytes in `segments` messages. While one is on
    its way, the next is sent, and a message that has arrived is passed on immediately. So latency
    shows only as far as it exceeds the time to send the other segments.
    """
    steps, sent_s = 2 * (ranks - 1), count / ranks / link.bytes_per_s
    if steps == 0:
        return 0.0
    step_s = max(sent_s, sent_s / segments + link.latency_s)
    return (steps - 1) * step_s + sent_s + link.latency_s


def halving_doubling_s(count: float, ranks: int, link: Link) -> float:
    """Return the seconds of recursive halving and doubling of `count` bytes.

    It takes 2·log2(p) steps and 2(p - 1)/p of the bytes. Where p is no power of two, binary blocks
    are used (section 4; Rabenseifner and Träff 2004): all blocks halve at the same time; then each
    of a block's s ranks sends its s-th part to the next larger block, as soon as it has received
    that of the next smaller one. Doubling is the same in reverse.
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
    """Nodes of `ranks_per_node` ranks each.

    `inside` is the link of a rank to its node, `between` that of a node to the others, all its
    interfaces together, and `overhead_s` the fixed cost of an all-reduce.
    """

    ranks_per_node: int
    inside: Link
    between: Link
    overhead_s: float = 0.0
    algorithm: Literal["ring", "halving_doubling", "faster"] = "faster"  # between nodes
    segments: int = 1  # of each step of a ring: 2 with Gloo; NCCL pipelines as well

    def all_reduce_s(self, count: float, ranks: int) -> float:
        """Return the seconds of an all-reduce of `count` bytes.

        They are reduced inside each node, summed between the nodes, and distributed inside each
        node (section 4, phases 1 to 3).
        """
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
    """The gradient of a parameter tensor, and its share of the time of the backward pass."""

    gradient_bytes: int
    backward_share: float


@dataclass(frozen=True)
class Bucket:
    """Gradients that are summed in one all-reduce."""

    count: float  # bytes
    ready: float  # share of the backward pass after which all of them are there


def fill_buckets(
    layers: Sequence[Layer],
    first_bytes: int = FIRST_BUCKET_BYTES,
    bucket_bytes: int = BUCKET_BYTES,
) -> list[Bucket]:
    """Return DDP's buckets as they are from its second step on.

    They hold gradients in the order of the backward pass, the last of `layers` first. The gradient
    that fills a bucket is its last.
    """
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
    """Return the seconds from the end of the backward pass to the end of the last all-reduce.

    Buckets are sent one after the other, none before it is ready. `all_reduce_s` maps bytes to
    seconds.
    """
    end_s = 0.0
    for bucket in buckets:
        end_s = max(end_s, bucket.ready * backward_s) + all_reduce_s(bucket.count)
    return max(end_s - backward_s, 0.0)


@cache
def expected_maximum(ranks: int) -> float:
    """Return the mean of the largest of `ranks` standard normal numbers: 0 for 1, 0.564 for 2."""
    normal, step = NormalDist(), 0.002
    # E[max] = ∫ (1 - Φ^W) over x > 0, minus ∫ Φ^W over x < 0, by the midpoint rule up to 9 σ.
    points = [(i + 0.5) * step for i in range(4500)]
    above = sum(1 - normal.cdf(x) ** ranks for x in points)
    return (above - sum(normal.cdf(-x) ** ranks for x in points)) * step


@dataclass(frozen=True)
class Workload:
    """The work of one rank in a step.

    `backward_s`, a part of `compute_s`, is the backward pass of the last micro-batch: gradients
    are summed during it only, as DDP's `no_sync` covers those before. `spread` is the standard
    deviation of the compute time from step to step, as a share of its mean.
    """

    compute_s: float
    backward_s: float
    buckets: tuple[Bucket, ...]
    spread: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """The parts of a step's time, which add up to `step_s`. `limit` names the largest."""

    compute_s: float
    straggling_s: float  # waiting for the slowest rank
    exposed_s: float  # communication that the backward pass does not hide
    limit: str

    @property
    def step_s(self) -> float:
        return self.compute_s + self.straggling_s + self.exposed_s


def step_time(work: Workload, network: Network, ranks: int) -> StepTime:
    """Predict the step time of `ranks` ranks that each have this workload.

    Every rank waits for the slowest; their compute times are assumed to be independent and normal.
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
    """Return the resource that, if it were free, would shorten exposed communication the most."""
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
    """Return the least bandwidth of a node at which the backward pass hides `count` bytes.

    This is section 4's estimate: 2(p - 1)/p of the bytes, regardless of latency and of the
    gradients that are ready last.
    """
    return 2 * (nodes - 1) / nodes * count / backward_s


def efficiency(alone_step_s: float, step_s: float) -> float:
    """Return the efficiency of weak scaling: images/s per rank, relative to a rank alone."""
    return alone_step_s / step_s
