"""The model of a step's time: each number here was computed by hand."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.planning.step_time_model import (
    Bucket,
    Layer,
    Link,
    Network,
    Workload,
    efficiency,
    expected_maximum,
    exposed_s,
    fill_buckets,
    halving_doubling_s,
    keeping_up_bytes_per_s,
    ring_s,
    step_time,
)

LINK = Link(latency_s=1.0, bytes_per_s=100.0)


def test_ring() -> None:
    # 4 ranks, 800 bytes: 6 steps of 1 s + 200/100 s
    assert ring_s(800, 4, LINK) == pytest.approx(18)
    assert ring_s(800, 1, LINK) == 0
    assert ring_s(800, 2, LINK) == pytest.approx(10)  # 2 steps of 1 s + 4 s


def test_a_ring_of_segments_hides_latency() -> None:
    # in halves of 1 s: a step's second half is sent while the first is on its way for 1 s; so it
    # is passed on without a pause: 6 steps of 2 s, and the last half's way
    assert ring_s(800, 4, LINK, segments=2) == pytest.approx(13)
    # on its way for 3 s: from one step to the next 1 s + 3 s; the last: 2 s + 3 s
    assert ring_s(800, 4, replace(LINK, latency_s=3), segments=2) == pytest.approx(5 * 4 + 5)


def test_halving_and_doubling() -> None:
    # 4 ranks: 400, 200 bytes out and back in 4 steps: 4 s + 12 s; the ring's bytes, fewer steps
    assert halving_doubling_s(800, 4, LINK) == pytest.approx(16)
    assert halving_doubling_s(800, 1, LINK) == 0
    assert halving_doubling_s(800, 2, LINK) == pytest.approx(10)
    # 3 = 2 + 1: the one sends 800 bytes, 1 s + 8 s, while the others halve, 1 s + 4 s; and back
    assert halving_doubling_s(800, 3, LINK) == pytest.approx(18)
    # 6 = 4 + 2: the 2 halve in 1 s + 4 s and hand on 400 bytes each, 1 s + 4 s; the 4, 2 s + 6 s
    assert halving_doubling_s(800, 6, LINK) == pytest.approx(20)
    # 7 = 4 + 2 + 1: 9 s as for 3, then 400 bytes, 1 s + 4 s
    assert halving_doubling_s(800, 7, LINK) == pytest.approx(28)
    # the paper's 44 servers = 32 + 8 + 4: the 4 have handed on after 3 s + 8 s, the 8 after another
    # 1 s + 1 s; 2.25 of the bytes in all
    assert halving_doubling_s(800, 44, LINK) == pytest.approx(2 * 13)


def test_nodes() -> None:
    network = Network(
        ranks_per_node=2,
        inside=Link(0.5, 400),
        between=LINK,
        overhead_s=0.25,
        algorithm="halving_doubling",
    )
    # inside: 2 steps of 0.5 s + 2 s; between 4 nodes: 16 s, see above
    assert network.all_reduce_s(800, 8) == pytest.approx(0.25 + 3 + 16)
    assert network.all_reduce_s(800, 7) == pytest.approx(0.25 + 3 + 16)  # 4 nodes, one not full
    assert network.all_reduce_s(800, 2) == pytest.approx(0.25 + 3)
    assert network.all_reduce_s(800, 1) == 0
    assert replace(network, algorithm="ring").all_reduce_s(800, 8) == pytest.approx(0.25 + 3 + 18)
    # by the faster of both: at 7 nodes the ring, 12 s + 13.71 s against 28 s
    faster = replace(network, algorithm="faster")
    assert faster.all_reduce_s(800, 14) == pytest.approx(0.25 + 3 + 12 + 800 * 12 / 7 / 100)


def test_buckets_fill_from_the_last_layer() -> None:
    layers = [Layer(100, 0.4), Layer(300, 0.3), Layer(50, 0.2), Layer(60, 0.1)]
    # 60 + 50 reach 100; then 300 + 100 reach 400
    assert fill_buckets(layers, 100, 400) == [Bucket(110, pytest.approx(0.3)), Bucket(400, 1.0)]
    # 60 fill the first of 60; 50 + 300 the next of 350; 100 are left
    assert fill_buckets(layers, 60, 350) == [
        Bucket(60, 0.1),
        Bucket(350, pytest.approx(0.6)),
        Bucket(100, 1.0),
    ]


def test_a_timeline() -> None:
    """Backward 10 s, 1 s for 100 bytes.

    ready      3 s      6 s                10 s
    network    |3-- 100 --4|  |6--- 500 ---11|11- 200 -13|
    """
    buckets = [Bucket(100, 0.3), Bucket(500, 0.6), Bucket(200, 1.0)]
    assert exposed_s(buckets, 10, lambda count: count / 100) == pytest.approx(3)
    assert exposed_s(buckets, 10, lambda count: count / 1000) == pytest.approx(0.2)  # only the last
    assert exposed_s(buckets, 0, lambda count: count / 100) == pytest.approx(8)  # nothing hides it


def test_the_slowest_of_several() -> None:
    # 1/√π and 3/(2√π) are known
    assert expected_maximum(1) == pytest.approx(0, abs=1e-9)
    assert expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), rel=1e-6)
    assert expected_maximum(3) == pytest.approx(1.5 / math.sqrt(math.pi), rel=1e-6)


def test_a_step_and_what_limits_it() -> None:
    network = Network(1, inside=LINK, between=LINK, algorithm="ring")
    work = Workload(compute_s=30, backward_s=10, buckets=(Bucket(800, 1.0),), spread=0.1)
    # 30 s + 0.1 · 30 · 0.5642 s for the slower of two + 10 s (the ring above)
    step = step_time(work, network, 2)
    assert step.step_s == pytest.approx(30 + 3 / math.sqrt(math.pi) + 10)
    assert (step.exposed_s, step.limit) == (pytest.approx(10), "compute")
    assert efficiency(30, step.step_s) == pytest.approx(30 / 41.6926, rel=1e-5)
    short = replace(work, compute_s=5, backward_s=0)  # 2 s of latency, 8 s of bytes
    assert step_time(short, network, 2).limit == "bandwidth between nodes"
    # 198 s of latency, 15.84 s of bytes
    assert step_time(short, network, 100).limit == "latency"
    inside = replace(network, ranks_per_node=2, between=Link(1.0, 1e9))
    assert step_time(short, inside, 2).limit == "bandwidth inside a node"
    assert step_time(replace(short, spread=10.0), network, 2).limit == "straggling"


def test_the_papers_estimate() -> None:
    # section 4: 2 · 100 MB in 0.125 s are 12.8 Gbit/s, for many servers
    assert keeping_up_bytes_per_s(100e6, 0.125, 10**9) * 8 / 1e9 == pytest.approx(12.8)
    assert keeping_up_bytes_per_s(100e6, 0.125, 2) * 8 / 1e9 == pytest.approx(6.4)


def test_buckets_are_ddps() -> None:
    """Against the buckets that DDP itself reports after its first step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(size, size, bias=False) for size in 6 * [300]))
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        for _ in range(3):  # the buckets are made anew after the first
            ddp(torch.ones(1, 300)).sum().backward()
        data = ddp._get_ddp_logging_data()
    finally:
        dist.destroy_process_group()
    layers = [Layer(4 * p.numel(), 1 / 6) for p in model.parameters()]
    ours = [bucket.count for bucket in fill_buckets(layers)]
    # 360,000 bytes each: 3 reach 1 MiB, the other 3 do not reach 25 MiB
    assert ours == [1_080_000, 1_080_000]
    assert [int(size) for size in data["rebuilt_bucket_sizes"].split(",")] == ours
