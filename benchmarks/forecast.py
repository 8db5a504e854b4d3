"""Step times predicted by the model for the paper's machines and for newer ones.

    python -m benchmarks.forecast

This is arithmetic from published or assumed figures; nothing is measured. docs/scaling.md
shows the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from harness.config.loading import load_config
from harness.models.registry import build_model
from harness.planning.runtime import BACKWARD_SHARE, Hardware, gradient_layers, multiply_adds
from harness.planning.step_time_model import (
    BUCKET_BYTES,
    FIRST_BUCKET_BYTES,
    MIB,
    Bucket,
    Link,
    Network,
    Workload,
    communication_limit,
    fill_buckets,
    keeping_up_bytes_per_s,
    step_time,
)

CONFIG = Path(__file__).parents[1] / "configs/imagenet/resnet50_8192.yaml"
GBIT = 1e9 / 8  # bytes
# the paper's: 0.256 s per step, of which 0.12 s backward, 8 P100 and 50 Gbit/s per server
PAPER_STEP_S, PAPER_BACKWARD_S, PAPER_GBIT_PER_S = 0.256, 0.120, 50.0
# assumptions that are not in the paper: the latency of Ethernet and of a P100's NVLink
PAPER_BETWEEN_LATENCY_S, PAPER_INSIDE = 20e-6, Link(5e-6, 20e9)
# published images/s of one GPU: an H200 in PyTorch, an H100 and an H200 at MLPerf 4.0
PUBLISHED = {"H200, PyTorch": 3060.0, "H100, MLPerf": 7160.0, "H200, MLPerf": 7945.0}
GPUS = (1, 8, 16, 64, 256, 1024, 4096)
WORKER_BATCHES = (32, 64, 128, 256)
BUCKETS_MIB = (1, 5, 10, 25, 50, 100)
SPREAD = 0.01


def resnet50_buckets(
    bucket_bytes: int = BUCKET_BYTES, first_bytes: int = FIRST_BUCKET_BYTES
) -> tuple[Bucket, ...]:
    """Return DDP's buckets; of one byte each for separate gradients, as the paper sums them."""
    model = build_model(load_config(CONFIG))
    layers = gradient_layers(model, multiply_adds(model, 224))
    return tuple(fill_buckets(layers, first_bytes, bucket_bytes))


def paper_lines() -> Iterator[str]:
    """Yield section 4's estimate, and figures 7 and 8, as predicted by the model."""
    buckets = resnet50_buckets(1, 1)
    count = sum(bucket.count for bucket in buckets)
    yield "| servers | Gbit/s to sum 100 MB in 0.125 s | 102.2 MB in 0.120 s |"
    yield "| --- | --- | --- |"
    for servers in (32, 44):
        needed = [
            keeping_up_bytes_per_s(*what, servers) / GBIT
            for what in ((100e6, 0.125), (count, PAPER_BACKWARD_S))
        ]
        yield f"| {servers} | {needed[0]:.1f} | {needed[1]:.1f} |"
    yield ""
    yield "| Gbit/s per server | spread of a GPU's step | 8 to 352 GPUs | efficiency at 256 |"
    yield "| --- | --- | --- | --- |"
    for gbit_per_s, spread in ((15, 0), (25, 0), (50, 0), (50, 0.02), (50, 0.05), (50, 0.08)):
        between = Link(PAPER_BETWEEN_LATENCY_S, gbit_per_s * GBIT)
        network = Network(8, PAPER_INSIDE, between, algorithm="halving_doubling")
        work = Workload(PAPER_STEP_S, PAPER_BACKWARD_S, buckets, spread)
        few, most, many = (step_time(work, network, gpus).step_s for gpus in (8, 256, 352))
        yield f"| {gbit_per_s} | {spread:.0%} | {many / few - 1:+.1%} | {few / most:.1%} |"


def worker(
    images_per_s: float, images: int, buckets: tuple[Bucket, ...], sent: float = 1.0
) -> Workload:
    """Return the work of a GPU with one worker; `sent` is the share of the float32 bytes sent."""
    compute_s = images / images_per_s
    counts = tuple(replace(bucket, count=sent * bucket.count) for bucket in buckets)
    return Workload(compute_s, BACKWARD_SHARE * compute_s, counts)


def share(work: Workload, gpus: int, gbit_per_s: float) -> float:
    """Return the efficiency of weak scaling."""
    network = Hardware(gbit_per_s=gbit_per_s).network(gpus)
    return step_time(work, network, 1).step_s / step_time(work, network, gpus).step_s


def gpu_lines() -> Iterator[str]:
    """Yield the table for one worker of 32 images per GPU, k = GPUs, 400 Gbit/s each."""
    buckets = resnet50_buckets()
    yield "| one GPU | GPUs (k) | ms per step | exposed, ms | efficiency | bfloat16 | n = 256 |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, images_per_s in PUBLISHED.items():
        for gpus in GPUS:
            work = worker(images_per_s, 32, buckets)
            step = step_time(work, Hardware().network(gpus), gpus)
            half = share(worker(images_per_s, 32, buckets, sent=0.5), gpus, 400)
            large = share(worker(images_per_s, 256, buckets), gpus, 400)
            yield (
                f"| {name} | {gpus} | {1e3 * step.step_s:.2f} | {1e3 * step.exposed_s:.2f} | "
                f"{work.compute_s / step.step_s:.1%} | {half:.1%} | {large:.1%} |"
            )


def limit_lines() -> Iterator[str]:
    """Yield the table of what limits 4,096 GPUs, and of the slowest sufficient network."""
    buckets, gpus = resnet50_buckets(), GPUS[-1]
    yield (
        "| one GPU | n | exposed: limited by | waiting for the slowest, spread 1 % | "
        "Gbit/s per GPU for 95 %: float32 | bfloat16 |"
    )
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, images_per_s in PUBLISHED.items():
        for images in WORKER_BATCHES:
            work = worker(images_per_s, images, buckets)
            slow = step_time(replace(work, spread=SPREAD), Hardware().network(gpus), gpus)
            needed = [
                slowest_gbit_per_s(worker(images_per_s, images, buckets, sent), gpus)
                for sent in (1.0, 0.5)
            ]
            limit = communication_limit(work, Hardware().network(gpus), gpus)
            yield (
                f"| {name} | {images} | {limit}, "
                f"{1e3 * slow.exposed_s:.2f} ms | {1e3 * slow.straggling_s:.2f} ms | "
                f"{needed[0]:.0f} | {needed[1]:.0f} |"
            )


def bucket_lines() -> Iterator[str]:
    """Yield milliseconds of exposed communication by DDP's bucket size, 32 images per GPU."""
    sizes_mib = " | ".join(f"{mib} MiB" for mib in BUCKETS_MIB)
    yield f"| one GPU | GPUs | Gbit/s per GPU | {sizes_mib} |"
    yield "| --- " * (3 + len(BUCKETS_MIB)) + "|"
    sizes = [resnet50_buckets(mib * MIB) for mib in BUCKETS_MIB]
    for name, gbit_per_s in (("H200, PyTorch", 400), ("H200, MLPerf", 400), ("H200, MLPerf", 100)):
        for gpus in (8, 256, 4096):
            network = Hardware(gbit_per_s=gbit_per_s).network(gpus)
            works = [worker(PUBLISHED[name], 32, buckets) for buckets in sizes]
            exposed_ms = [1e3 * step_time(work, network, gpus).exposed_s for work in works]
            cells = " | ".join(f"{ms:.2f}" for ms in exposed_ms)
            yield f"| {name} | {gpus} | {gbit_per_s} | {cells} |"


def slowest_gbit_per_s(work: Workload, gpus: int, wanted: float = 0.95) -> float:
    """Return the least bandwidth per GPU for an efficiency; inf if none is enough."""
    low, high = 1e-3, 1e6
    if share(work, gpus, high) < wanted:
        return float("inf")
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if share(work, gpus, middle) < wanted else (low, middle)
    return high


TABLES = (paper_lines, gpu_lines, limit_lines, bucket_lines)


def main() -> None:
    """Print the tables of docs/scaling.md."""
    for lines in TABLES:
        print(*lines(), sep="\n", end="\n\n")


if __name__ == "__main__":
    main()
