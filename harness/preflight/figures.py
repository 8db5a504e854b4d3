"""What a rank measures, and when a figure falls short."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RankFigures:
    """A rank's figures by the names of `LIMITS`, and what has to be equal on all ranks.

    `node` is SLURM's name of the machine, or the host's. A figure that a rank does not measure is
    absent.
    """

    rank: int
    node: str
    figures: dict[str, float] = field(default_factory=dict)
    equal: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Limit:
    """The limit of a figure: `at_least` or `at_most` this share of what most ranks have.

    `margin` is added to a limit above, so that small numbers are not compared. With `share` 0 the
    margin alone is the limit.
    """

    unit: str
    share: float
    at_least: bool = True
    margin: float = 0.0

    def threshold(self, values: Sequence[float]) -> float:
        """Return the limit; of an even number of ranks the better half is the measure."""
        middle = statistics.median_high if self.at_least else statistics.median_low
        return self.share * middle(values) + self.margin


LIMITS = {
    "matrix product": Limit("GFLOP/s", 0.6),
    "memory copy": Limit("GB/s", 0.4),
    "CPU time withheld by a cgroup": Limit("%", 0.0, at_least=False, margin=10.0),
    "sending to the next rank": Limit("MB/s", 0.2),
    "latency to the next rank": Limit("ms", 5.0, at_least=False, margin=10.0),
    "clock ahead of rank 0's": Limit("s", 0.0, at_least=False, margin=0.5),
    "clock behind rank 0's": Limit("s", 0.0, at_least=False, margin=0.5),
    "reading images": Limit("MB/s", 0.1),
    "opening an image": Limit("ms", 5.0, at_least=False, margin=20.0),
    "writing the run folder": Limit("MB/s", 0.1),
    "free in /dev/shm": Limit("MB", 0.2),
    "free memory": Limit("GB", 0.5),
    "nccl-tests bus bandwidth": Limit("GB/s", 0.7),
    "dcgmi diag failures": Limit("", 0.0, at_least=False, margin=0.5),
}


@dataclass(frozen=True)
class Problem:
    """A node that falls short, with the figure and its threshold."""

    node: str
    text: str


def find_problems(ranks: Sequence[RankFigures]) -> list[Problem]:
    """Return what is wrong, rank by rank for each figure; [] where all nodes are healthy."""
    found = [problem for name in LIMITS for problem in _beyond_limit(name, ranks)]
    names = dict.fromkeys(name for rank in ranks for name in rank.equal)
    return found + [problem for name in names for problem in _unequal(name, ranks)]


def values_of(name: str, ranks: Sequence[RankFigures]) -> list[float]:
    """Return the figures of all ranks that have it."""
    return [rank.figures[name] for rank in ranks if name in rank.figures]


def _beyond_limit(name: str, ranks: Sequence[RankFigures]) -> Iterator[Problem]:
    values = values_of(name, ranks)
    if not values:
        return
    limit = LIMITS[name]
    threshold = limit.threshold(values)
    for rank in ranks:
        value = rank.figures.get(name, threshold)
        if value < threshold if limit.at_least else value > threshold:
            sign = "below" if limit.at_least else "above"
            unit = limit.unit and f" {limit.unit}"
            figures = f"{value:.3g}{unit}, {sign} {threshold:.3g}{unit}"
            yield Problem(rank.node, f"{name} (rank {rank.rank}): {figures}")


def _unequal(name: str, ranks: Sequence[RankFigures]) -> Iterator[Problem]:
    having = [rank for rank in ranks if name in rank.equal]
    usual, _ = Counter(rank.equal[name] for rank in having).most_common(1)[0]
    different = {rank.node: rank.equal[name] for rank in having if rank.equal[name] != usual}
    for node, value in different.items():
        yield Problem(node, f"{name}: {value}, other nodes have {usual}")
