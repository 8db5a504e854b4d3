"""One rank of the all-reduce benchmark: the parts of the model that a DDP step does not isolate.

all_reduce.py starts it on a host of its own. Each part is timed in blocks of all-reduces (or
steps), one after the other; a block begins with a barrier and is timed on its slowest rank.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.conditions import at_least_two, spread
from benchmarks.hosts import Interface
from benchmarks.scaling_rank import Waits
from harness.planning.step_time_model import MIB

PATIENCE = timedelta(hours=1)  # time-out of ranks that take no part in a measurement
SIZES = (MIB // 4, MIB)  # bytes summed
INSIDE = 2.0  # rate of a rank's link to its node, relative to the node's link to the others
# straggling: spreads of compute (0 for comparison), and the steps in a block of each
SPREADS, WAIT_S, STEPS = (0.0, 0.05, 0.1), 0.05, 40
GRADIENT_BYTES = 1024  # small, as ranks that sum simultaneously would wait for the cores


@dataclass(frozen=True)
class Exchange:
    """An exchange with one peer: the part sent to it, and the part received from it and added.

    On the way back the two are swapped. Either may be empty.
    """

    peer: int
    sent: Tensor
    kept: Tensor


class Halving:
    """All-reduce the vector `numbers` in place by recursive halving and doubling.

    `ranks`: the participants, including this one, in binary blocks. All receives are posted
    immediately, since Gloo sends only to posted receives.
    """

    def __init__(self, numbers: Tensor, ranks: Sequence[int]) -> None:
        self.exchanges, self.part = plan(numbers, ranks, dist.get_rank())
        self.scratch = [torch.empty_like(exchange.kept) for exchange in self.exchanges]
        self.to_add = [
            receive(scratch, exchange.peer)
            for scratch, exchange in zip(self.scratch, self.exchanges, strict=True)
        ]
        self.to_take = [receive(exchange.sent, exchange.peer) for exchange in self.exchanges[::-1]]
        self.sending: list[dist.Work] = []

    def reduce(self) -> None:
        """Leave the sum of its `part` in each rank of the largest block."""
        for exchange, scratch, coming in zip(
            self.exchanges, self.scratch, self.to_add, strict=True
        ):
            self._send(exchange.sent, exchange.peer)
            if coming is not None:
                coming.wait()
                exchange.kept.add_(scratch)

    def gather(self) -> None:
        """Distribute the parts, after which all ranks have the whole sum."""
        for exchange, coming in zip(self.exchanges[::-1], self.to_take, strict=True):
            self._send(exchange.kept, exchange.peer)
            if coming is not None:
                coming.wait()
        for sent in self.sending:
            sent.wait()

    def _send(self, numbers: Tensor, peer: int) -> None:
        if len(numbers) and (sending := dist.isend(numbers, peer)) is not None:
            self.sending.append(sending)


def receive(numbers: Tensor, peer: int) -> dist.Work | None:
    """Post a receive, if there is anything to receive."""
    return dist.irecv(numbers, peer) if len(numbers) else None


def plan(numbers: Tensor, ranks: Sequence[int], rank: int) -> tuple[list[Exchange], Tensor]:
    """Return the exchanges of `rank`, in order, and the part of `numbers` that it ends up with."""
    blocks = binary_blocks(ranks)
    place = next(place for place, block in enumerate(blocks) if rank in block)
    block, size = blocks[place], len(blocks[place])
    index, nothing = block.index(rank), numbers[:0]

    def span(first: int, count: int, of: int) -> Tensor:
        return numbers[len(numbers) * first // of : len(numbers) * (first + count) // of]

    exchanges, distance = [], size // 2
    while distance:
        first = index // distance * distance  # the first of the parts that are kept
        exchanges.append(
            Exchange(
                block[index ^ distance],
                span(first ^ distance, distance, size),
                span(first, distance, size),
            )
        )
        distance //= 2
    own = span(index, 1, size)
    if smaller := blocks[place + 1 : place + 2]:
        giver = smaller[0][index * len(smaller[0]) // size]
        exchanges.append(Exchange(giver, nothing, own))
    if place:
        larger = blocks[place - 1]
        each = len(larger) // size
        for other in range(index * each, (index + 1) * each):
            exchanges.append(Exchange(larger[other], span(other, 1, len(larger)), nothing))
    return exchanges, own


def binary_blocks(ranks: Sequence[int]) -> list[Sequence[int]]:
    """Split ranks into blocks of powers of two, the largest first: 7 into 4, 2 and 1."""
    blocks, rest = [], ranks
    while rest:
        size = 1 << (len(rest).bit_length() - 1)
        blocks.append(rest[:size])
        rest = rest[size:]
    return blocks


def halving_doubling(numbers: Tensor, ranks: Sequence[int]) -> None:
    """Sum a vector over `ranks`, in place."""
    halving = Halving(numbers, ranks)
    halving.reduce()
    halving.gather()


def by_nodes(numbers: Tensor, nodes: int, local_ranks: int) -> None:
    """Sum a vector over nodes of several ranks, as in the model (section 4's phases 1 to 3).

    Inside a node each rank gets the sum of a part, which it sums with its peers on the other nodes
    and distributes inside: a node sends each byte once through its only interface.
    """
    rank = dist.get_rank()
    node, local_rank = divmod(rank, local_ranks)
    inside = Halving(numbers, range(node * local_ranks, (node + 1) * local_ranks))
    between = Halving(inside.part, range(local_rank, nodes * local_ranks, local_ranks))
    inside.reduce()
    between.reduce()
    between.gather()
    inside.gather()


def measure_all_reduces(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure halving over one rank per node, then all ranks by nodes, at each speed."""
    rank, local_ranks = dist.get_rank(), options.local_ranks
    counts = range(2, dist.get_world_size() // local_ranks + 1)
    for mbit_per_s in options.mbit_per_s:
        if rank == 0:
            shape(options, mbit_per_s)
        for size in SIZES:
            numbers = torch.zeros(size // 4)
            place = {"bytes": size, "mbit_per_s": mbit_per_s, "delay_ms": options.delay_ms}
            for count in counts:
                leaders = range(0, count * local_ranks, local_ranks)
                found = measure(halving_doubling, (numbers, leaders), leaders, options)
                yield {"part": "halving", "nodes": count, "local_ranks": 1} | place | found
            for count in counts if local_ranks > 1 else ():
                arguments = (numbers, count, local_ranks)
                found = measure(by_nodes, arguments, range(count * local_ranks), options)
                yield {"part": "nodes", "nodes": count, "local_ranks": local_ranks} | place | found


def shape(options: argparse.Namespace, mbit_per_s: float) -> None:
    """List every link of every host."""
    for interface in options.between:
        interface.shape(mbit_per_s)
    for interface in options.inside:
        interface.shape(INSIDE * mbit_per_s)


def measure(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    ranks: Sequence[int],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Time the function on `ranks`, in seconds; the other ranks of the world wait."""

    def seconds(times: int) -> float:
        dist.barrier()
        start = time.perf_counter()
        if dist.get_rank() in ranks:
            for _ in range(times):
                function(*arguments)
        slowest = torch.tensor((time.perf_counter() - start) / times)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest)

    times = max(round(options.block_seconds / seconds(1)), 1)
    return {
        "all_reduce_s": spread([seconds(times) for _ in range(options.repetitions)]),
        "all_reduces_a_block": times,
    }


def measure_straggling(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure how much steps slow down if compute varies by rank; one rank per node, fast links."""
    for count in range(2, dist.get_world_size() // options.local_ranks + 1):
        ranks = list(range(0, count * options.local_ranks, options.local_ranks))
        group = dist.new_group(ranks, timeout=PATIENCE)  # a collective call of all ranks
        if isinstance(group, dist.ProcessGroup):  # this rank is a member
            yield from straggle(group, count, options.repetitions)
        dist.barrier()


def straggle(group: dist.ProcessGroup, ranks: int, repetitions: int) -> Iterator[dict[str, Any]]:
    """Alternate steps with random waits and steps with equal waits.

    The latter show what a step takes after its slowest rank's compute.
    """
    blocks = straggling_blocks(group)
    next(blocks)  # DDP rebuilds its buckets after the first step
    steps_s, computes_s = zip(*itertools.islice(blocks, repetitions), strict=True)
    means_s = [summed(compute_s, dist.ReduceOp.SUM, group) / ranks for compute_s in computes_s]
    slowest_s = [summed(compute_s, dist.ReduceOp.MAX, group) for compute_s in computes_s]
    variance = summed(torch.cat(computes_s).var(0), dist.ReduceOp.SUM, group) / ranks
    found = [
        {
            "straggling_s": step_s - mean_s - (step_s - slow_s).mean(0)[0],
            "slowest_s": slow_s - mean_s,  # of compute alone
        }
        for step_s, mean_s, slow_s in zip(steps_s, means_s, slowest_s, strict=True)
    ]
    for number, share in list(enumerate(SPREADS))[1:]:
        yield {
            "part": "straggling",
            "ranks": ranks,
            "set_spread": share,
            "compute_s": float(torch.cat(means_s).mean(0)[number]),
            "deviation_s": float(variance[number].sqrt()),
            "steps_a_block": STEPS,
        } | {
            key: spread([float(block[key].mean(0)[number]) for block in found]) for key in found[0]
        }


def straggling_blocks(group: dist.ProcessGroup) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, endlessly, the seconds of STEPS steps of each spread, and of this rank's compute."""
    model, draw, computed = Waits(GRADIENT_BYTES), random.Random(dist.get_rank()), [0.0]
    ddp = DistributedDataParallel(model, process_group=group)

    def note_the_end(gradient: Tensor) -> None:
        computed[0] = time.perf_counter()

    model.weights[0].register_hook(note_the_end)  # the last gradient of the backward pass
    while True:
        step_s, compute_s = torch.zeros(2, STEPS, len(SPREADS), dtype=torch.float64)
        dist.barrier(group)
        for step, (number, share) in itertools.product(range(STEPS), enumerate(SPREADS)):
            model.wait_s, start = WAIT_S * (1 + share * draw.gauss(0, 1)), time.perf_counter()
            ddp(torch.zeros(1)).sum().backward()
            step_s[step, number] = time.perf_counter() - start
            compute_s[step, number] = computed[0] - start
            ddp.zero_grad(set_to_none=True)
        yield step_s, compute_s


def summed(numbers: Tensor, how: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> Tensor:
    """Return the maximum over the ranks of the group; `numbers` remains unchanged."""
    numbers = numbers.clone()
    dist.all_reduce(numbers, how, group)
    return numbers


def interface(text: str) -> Interface:
    """Parse NAMESPACE:NAME."""
    return Interface(*text.split(":"))


def main() -> None:
    """Measure; rank 0 writes the points to --out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--local-ranks", type=int, required=True, help="ranks per node")
    parser.add_argument("--inside", type=interface, nargs="*", default=[], metavar="NAMESPACE:NAME")
    parser.add_argument("--between", type=interface, nargs="+", metavar="NAMESPACE:NAME")
    parser.add_argument("--mbit-per-s", type=float, nargs="+", required=True)
    parser.add_argument("--delay-ms", type=float, default=0.0, help="only noted")
    parser.add_argument("--straggling", action="store_true", help="first measure straggling too")
    parser.add_argument("--repetitions", type=at_least_two, default=5)
    parser.add_argument("--block-seconds", type=float, default=0.3)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    options = parser.parse_args()
    dist.init_process_group("gloo", timeout=PATIENCE)
    points = list(measure_straggling(options)) if options.straggling else []
    points += measure_all_reduces(options)
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps(points))
    dist.barrier()  # no rank leaves before the others have received its data
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
