"""The all-reduce benchmark: exact sums on real ranks, the fit, the documented errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import all_reduce, hosts
from benchmarks.all_reduce_rank import by_nodes, halving_doubling
from harness.planning.step_time_model import MIB
from tests.conftest import start_ranks

ROOT = Path(__file__).parents[2]
LENGTHS = (1024, 1000, 97)  # parts of equal and of unequal sizes
NOTHING_TO_DO = 7.0


def numbers_of(rank: int, length: int) -> torch.Tensor:
    """Integers, of which no two ranks' and no two places' are alike."""
    return torch.arange(length, dtype=torch.float64) * (rank + 1) + 1000 * rank


def check_sums() -> None:
    """On each rank: over all of them, over all but the first (of three: two), and by nodes."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for length in LENGTHS:
        for ranks in (range(world_size), range(1, world_size)):
            numbers = numbers_of(rank, length) if rank in ranks else torch.tensor([NOTHING_TO_DO])
            if rank in ranks:
                halving_doubling(numbers, ranks)
                assert torch.equal(numbers, sum(numbers_of(other, length) for other in ranks))
        if world_size % 2 == 0:
            numbers = numbers_of(rank, length)
            by_nodes(numbers, nodes=world_size // 2, local_ranks=2)
            expected = sum(numbers_of(other, length) for other in range(world_size))
            assert torch.equal(numbers, expected)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [3, 4])
def test_sums_are_exact(world_size: int) -> None:
    code = "from tests.benchmarks.test_all_reduce import check_sums; check_sums()"
    ranks = start_ranks(world_size, ["-c", code])
    said = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size, said


def summed(nodes: int, mbit_per_s: float, local_ranks: int = 1, delay_ms: float = 0.0) -> dict:
    return {
        "part": "nodes" if local_ranks > 1 else "halving",
        "nodes": nodes,
        "local_ranks": local_ranks,
        "bytes": MIB,
        "mbit_per_s": mbit_per_s,
        "delay_ms": delay_ms,
    }


def waiting(ranks: int) -> dict:
    return {
        "part": "straggling",
        "ranks": ranks,
        "set_spread": 0.1,
        "compute_s": 0.05,
        "deviation_s": 0.006,
    }


def test_the_predictions() -> None:
    """1 MiB at 10 MiB/s, of which 0.8; 1 ms a message."""
    fitted = all_reduce.Fitted(latency_s=1e-3, rate=0.8)
    speed = 10 * MIB * 8 / 1e6
    hand_computed = {
        2 * 1e-3 + 1 / 8: summed(2, speed),
        2 * (1e-3 + 1 / 8): summed(3, speed),  # the third sends all of it, and gets it back
        4 * 1e-3 + 1.5 / 8: summed(4, speed),
        4 * 6e-3 + 1.5 / 8: summed(4, speed, delay_ms=5.0),
        2 * 1e-3 + 1 / 16 + 2 * 1e-3 + 1 / 8: summed(
            2, speed, local_ranks=2
        ),  # inside twice as fast
        0.006 * 0.56419: waiting(2),
    }
    for seconds, point in hand_computed.items():
        assert all_reduce.predicted_s(point, fitted) == pytest.approx(seconds, rel=1e-5), point


def points_of(true: all_reduce.Fitted) -> list[dict]:
    """What the benchmark would measure, were the model true."""
    points = [
        summed(nodes, speed, local_ranks)
        for speed in all_reduce.SPEEDS
        for local_ranks in (1, 2)
        for nodes in (2, 3, 4)
    ]
    points += [summed(4, 30.0, delay_ms=5.0), waiting(2), waiting(3)]
    for point in points:
        key = "straggling_s" if point["part"] == "straggling" else "all_reduce_s"
        point[key] = {"median": all_reduce.predicted_s(point, true)}
    return points


def test_the_fit_finds_the_parameters_and_reports_what_is_wrong() -> None:
    true = all_reduce.Fitted(latency_s=2e-3, rate=0.93)
    points = points_of(true)
    judged = all_reduce.judge(points)
    assert judged["fitted"] == pytest.approx(true.__dict__, rel=1e-3)
    fitted = [row["case"] for row in judged["predictions"] if not row["held_out"]]
    assert fitted == [
        f"{nodes} hosts, 1024 KiB, {speed} Mbit/s" for speed in (10, 100, 1000) for nodes in (2, 4)
    ]
    assert set(judged["median_error_percent"]) == {
        "halving", "halving, delayed", "nodes", "straggling",
    }  # fmt: skip
    assert max(judged["median_error_percent"].values()) < 0.01
    points[-1]["straggling_s"]["median"] /= 2  # the model says twice as much
    points[-2]["straggling_s"]["median"] *= 2
    judged = all_reduce.judge(points)
    assert judged["predictions"][-1]["error_percent"] == pytest.approx(100)
    assert judged["predictions"][-2]["error_percent"] == pytest.approx(-50)
    assert judged["median_error_percent"]["straggling"] == pytest.approx(75)
    points[0]["all_reduce_s"]["median"] *= 2  # one that it was fitted to
    assert all_reduce.judge(points)["fitted"] != pytest.approx(true.__dict__, rel=1e-3)


def test_the_table_has_every_error(capsys: pytest.CaptureFixture[str]) -> None:
    points = points_of(all_reduce.Fitted(latency_s=2e-3, rate=0.93))
    for point in points:
        point["straggling_s" if point["part"] == "straggling" else "all_reduce_s"] |= {
            "quartile_1": 0.0, "quartile_3": 1.0,
        }  # fmt: skip
    all_reduce.print_errors(all_reduce.judge(points), points)
    said = capsys.readouterr().out
    assert len(re.findall(r"[+-] *\d+\.\d %", said)) == len(points)
    assert len(re.findall("median error of the held-out", said)) == 4


@pytest.mark.skipif(bool(hosts.missing()), reason=hosts.missing() or "hosts")
def test_hosts_are_at_their_nodes_bridge_and_nodes_at_one_between_them() -> None:
    with hosts.Hosts(4, hosts_per_node=2) as network:
        ports = {
            bridge: set(re.findall(r"(port\d|up\d|down\d)@", listed))
            for bridge in ("node0", "node1", "bridge")
            if (listed := hosts.run("ip", "-n", network.hub, "link", "show", "master", bridge))
        }
        for interface in network.between:
            interface.shape(30.0)
        shaped = hosts.run("ip", "netns", "exec", network.hub, "tc", "qdisc", "show")
    assert ports == {
        "node0": {"port0", "port1", "up0"},
        "node1": {"port2", "port3", "up1"},
        "bridge": {"down0", "down1"},
    }
    limited = set(re.findall(r"qdisc tbf \S+ dev (\S+) .* rate 30Mbit", shaped))
    assert limited == {"up0", "down0", "up1", "down1"}


def test_the_documented_errors_are_those_of_the_results() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "all_reduce.json").read_text())
    documented = (ROOT / "docs" / "scaling.md").read_text()
    for part, error in all_reduce.judge(results["points"])["median_error_percent"].items():
        assert re.search(rf"^\| {part} \|.* \| {error:.1f} % \|$", documented, re.MULTILINE), part
