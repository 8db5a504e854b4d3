"""Images/s of this project's loaders, of others, and of bare decoding, on the same JPEGs.

    python -m benchmarks.loaders FOLDER [--cores 2] [--batch 64] [--repetitions 7] [--batches 20]
    python -m benchmarks.loaders FOLDER --gpu [--batch 64]

--write stores the figures.

FOLDER contains images, or class folders of images; they are read repeatedly in random
order. All contenders produce the same: batches of training windows, 224 x 224, RGB, half of them
flipped, on the same cores, which nothing consumes. `float32` after a name: normalised
on the CPU, as is common; all others deliver uint8, as this project does. Each block
restarts its contender, lets it fill its queues, and measures from one batch to a later one; the
contenders alternate, forwards and backwards. Ratios are those of blocks of the same round.

The contenders are in `pipelines.py`.

--gpu: images/s of the DALI loader on a CUDA device by threads, with all and with none of the
decoding on the GPU's JPEG engine. It has not been run yet.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.conditions import benchmark_parser, spread, versions, write_results
from benchmarks.pipelines import CONTENDERS, SIZE, Job, Unavailable, ours
from harness.data.sources.listing import SUFFIXES

WARM_UP = 6  # batches: more than the length of any queue
BASES = ("torchvision, PIL", "DALI's own reader")
GPU_THREADS = (1, 2, 4, 6, 8, 12, 16)
QUARTILES = ("quartile_1", "median", "quartile_3")
PACKAGES = ("torchvision", "pillow", "timm", "simplejpeg", "ffcv", "nvidia-dali-cuda130")


def find_images(folder: Path) -> list[Path]:
    """List the images of a folder and its subfolders, sorted."""
    found = [path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES]
    found += [path for path in folder.glob("*/*") if path.suffix.lower() in SUFFIXES]
    if not found:
        raise SystemExit(f"error: {folder}: no images in it or its subfolders")
    return sorted(found)


def make_job(images: Sequence[Path], batches: int, cores: int, batch: int) -> Job:
    """Return enough images for the warm-up, `batches`, and those in preparation at the end."""
    needed = (WARM_UP + batches + 4 * cores + 8) * batch
    paths = [path for _ in range(needed // len(images) + 2) for path in images]
    random.Random(1).shuffle(paths)
    return Job(paths, cores, batch)


def images_per_s(name: str, job: Job, batches: int) -> tuple[float, int, tuple[int, ...]]:
    """Return a block's rate, the number of its images, and the shape of the last batch."""
    with CONTENDERS[name](job) as delivered:
        for _ in range(WARM_UP):
            next(delivered)
        images, start_s = 0, time.perf_counter()
        for _ in range(batches):
            batch = next(delivered)
            images += len(batch)
        seconds = time.perf_counter() - start_s
    return images / seconds, images, tuple(batch.shape)


def measure(
    names: Sequence[str], job: Job, repetitions: int, batches: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return a row for each contender that runs here, and why the others do not."""
    rates: dict[str, list[float]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    absent: dict[str, str] = {}
    for name in names:  # also warms the system's file cache
        try:
            _, images, shapes[name] = images_per_s(name, job, batches)
            if images != batches * job.batch:
                raise RuntimeError(f"{name}: {images} images in {batches} batches")
            rates[name] = []
        except Unavailable as error:
            absent[name] = str(error)
    for repetition in range(repetitions):
        for name in list(rates)[:: -1 if repetition % 2 else 1]:
            rates[name].append(images_per_s(name, job, batches)[0])
    rows = [
        {
            "contender": name,
            "batch_shape": shapes[name],
            "images_per_s": spread(rates[name]),
            **{f"ratio to {base}": ratio(rates, name, base) for base in BASES if base in rates},
        }
        for name in rates
    ]
    return rows, absent


def ratio(rates: dict[str, list[float]], name: str, base: str) -> dict[str, float]:
    """Return the ratio of two contenders over the blocks of the same round."""
    return spread([a / b for a, b in zip(rates[name], rates[base], strict=True)])


def print_table(rows: Sequence[dict[str, Any]], absent: dict[str, str]) -> None:
    """Print medians, with quartiles in brackets."""

    def cell(value: dict[str, float] | None, digits: int) -> str:
        if value is None:
            return f"{'-':>22}"
        low, median, high = (f"{value[key]:.{digits}f}" for key in QUARTILES)
        return f"{median:>8} ({low}, {high})".ljust(26)

    print(f"{'':36}{'images/s':26}{'to torchvision, PIL':26}to DALI's own reader")
    for row in rows:
        ratios = "".join(cell(row.get(f"ratio to {base}"), 2) for base in BASES)
        print(f"{row['contender']:36}{cell(row['images_per_s'], 0)}{ratios}")
    for name, reason in absent.items():
        print(f"{name:36}not run: {reason}")


def measure_gpu(
    images: Sequence[Path], repetitions: int, batches: int, batch: int
) -> list[dict[str, Any]]:
    """Measure the DALI loader on the current CUDA device, by threads and by decoder."""
    from harness.data.loaders import dali_tasks

    rows: list[dict[str, Any]] = []
    for load in (0.0, 1.0):
        dali_tasks.HARDWARE_LOAD = load
        for threads in GPU_THREADS:
            job = make_job(images, batches, threads, batch)
            rates = [gpu_images_per_s(job, batches) for _ in range(repetitions)]
            rows.append({"hardware_share": load, "threads": threads, "images_per_s": spread(rates)})
            print(f"hardware share {load}, {threads:2} threads: {rows[-1]['images_per_s']}")
    return rows


def gpu_images_per_s(job: Job, batches: int) -> float:
    """Return a block's rate; the clock stops after all of the device's work on the pixels."""
    with ours(job, "dali", cuda=True) as delivered:
        for _ in range(WARM_UP):
            next(delivered)
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        for _ in range(batches):
            next(delivered)
        torch.cuda.synchronize()
        return batches * job.batch / (time.perf_counter() - start_s)


def main() -> None:
    """Print a table; --write stores it in benchmarks/results/loaders.json."""
    parser = benchmark_parser(__doc__, repetitions=7)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--batches", type=int, default=20, help="per block, after the warm-up")
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    images = find_images(options.folder)
    about = {"images": len(images), "versions": versions(*PACKAGES), "pixels": SIZE}
    about |= {"batch": options.batch, "batches_a_block": options.batches}
    if options.gpu:
        rows = measure_gpu(images, options.repetitions, options.batches, options.batch)
        name, about = "loaders_gpu", about | {"rows": rows}
    else:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
        torch.set_num_threads(1)
        job = make_job(images, options.batches, options.cores, options.batch)
        rows, absent = measure(options.only, job, options.repetitions, options.batches)
        print_table(rows, absent)
        about |= {"rows": rows, "not_run": absent}
        name = "loaders"
    if options.write:
        print(write_results(name, about, options.write))


if __name__ == "__main__":
    main()
