"""The cost per rank of sampling ImageNet's 1,281,167 images: time, stalls, memory.

    python -m benchmarks.sampling [--repetitions 15] [--write]

It uses a synthetic index of that size (only the name and size of an image are ever used), for
rank 0 at the paper's minibatch of 8192 images. The batch plan's time per micro-batch is relative to
a rank's time for it at 4,200 images/s: 61 ms for 256 images, 7.6 ms for 32. The stalls are
those of a thread that only reads the clock while another computes a permutation.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.conditions import benchmark_parser, resident_mb, spread, write_results
from harness.config.loading import config_from_mapping
from harness.config.schema import Config
from harness.data.batch_plan import BatchPlan
from harness.data.sampling import permutation
from harness.data.sources import folder as kept
from harness.data.sources.folder import FolderSource, open_folder
from harness.data.sources.index_places import cache_places

TRAIN, VAL, CLASSES = 1_281_167, 50_000, 1000
NEED = 4_200  # images/s per rank
REQUESTS = 128  # half before an epoch's end, half after
CASES = [(8, 256), (256, 32)]  # ranks, images per micro-batch


def paper_config(train_images: int = TRAIN) -> Config:
    """Return a config with the paper's minibatch, for two epochs."""
    mapping = {
        "expect": {"error": 100, "source": "no training"},
        "data": {"train_images": train_images, "val_images": VAL, "classes": CLASSES},
        "model": {"name": "resnet50"},
        "recipe": {"minibatch": 8192, "epochs": 2, "warmup": "none", "milestones": [1]},
    }
    return config_from_mapping(mapping, "benchmarks/sampling.py")


def make_up_index(root: Path, split: str, images: int) -> None:
    """Write the stored index of a folder of this many images, without the images."""
    classes = [f"n{number:08}" for number in range(CLASSES)]
    for name in classes:
        (root / split / name).mkdir(parents=True)
        os.utime(root / split / name, (0, 0))  # so old that it is not checked for changes
    labels = np.sort(np.arange(images) % CLASSES)
    names = [f"n{label:08}_{number % 99999}.JPEG" for number, label in enumerate(labels.tolist())]
    sides = np.random.default_rng(1).integers(300, 600, (2, images), dtype=np.int32)
    index = FolderSource(root / split, tuple(classes), np.array(names, "S"), labels, *sides)
    place = cache_places(root / split)[0]
    kept._write_cache(place, index, [0] * CLASSES, time.time_ns())


def rank_memory(root: Path) -> dict[str, float]:
    """Return the MB that a rank's indices and batch plan add to a fresh process.

    `peak_mb` is the peak while the plan passes the end of an epoch.
    """
    config = paper_config()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before_mb = resident_mb("VmRSS")
    start_s = time.perf_counter()
    train, val = open_folder(root, "train"), open_folder(root, "val")
    load_s = time.perf_counter() - start_s
    index_mb = resident_mb("VmRSS") - before_mb
    batch_plan = BatchPlan(config, train, val, 0, *CASES[0], channels_last=True)
    for _ in batch_plan.training(config.steps_per_epoch - 2):
        pass
    return {
        "load_s": load_s,
        "index_mb": index_mb,
        "resident_mb": resident_mb("VmRSS") - before_mb,
        "peak_mb": resident_mb("VmHWM") - before_mb,
    }


def in_a_fresh_process(function: Callable[[Path], dict[str, float]], root: Path) -> dict:
    """Return what `function` returns in a fresh process."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (root,))


def milliseconds(function: Callable[[], object], repetitions: int) -> list[float]:
    """Return the milliseconds of each call, after a warm-up call."""
    times = []
    for _ in range(repetitions + 1):
        start_s = time.perf_counter()
        function()
        times.append((time.perf_counter() - start_s) * 1e3)
    return times[1:]


def longest_stall_ms(beside: Callable[[], object]) -> float:
    """Return the longest pause of this thread while another runs `beside`."""
    thread = threading.Thread(target=beside)
    thread.start()
    longest_s, last_s = 0.0, time.perf_counter()
    while thread.is_alive():
        now_s = time.perf_counter()
        longest_s, last_s = max(longest_s, now_s - last_s), now_s
    thread.join()
    return longest_s * 1e3


def waits_ms(train: FolderSource, val: FolderSource, ranks: int, micro_batch: int) -> list[float]:
    """Return the milliseconds that requests around an epoch's end wait, made at a rank's pace."""
    config = paper_config()
    batch_plan = BatchPlan(config, train, val, 0, ranks, micro_batch, channels_last=True)
    before = REQUESTS // 2 // len(batch_plan.micro_batches)  # steps
    requests, waits = batch_plan.training(config.steps_per_epoch - before), []
    next(requests)  # a run waits for its first permutation
    for _ in range(REQUESTS):
        start_s = time.perf_counter()
        next(requests)
        waits.append((time.perf_counter() - start_s) * 1e3)
        time.sleep(micro_batch / NEED)
    return waits


def main() -> None:
    """Print a table; --write stores it in benchmarks/results/sampling.json."""
    options = benchmark_parser(__doc__, repetitions=15).parse_args()
    results = measure(options.repetitions)
    for key, value in results.items():
        print(f"{key:42} {value['median'] if isinstance(value, dict) else value:10.3f}")
    if options.write:
        print(write_results("sampling", results, options.write))


def measure(repetitions: int) -> dict[str, Any]:
    """Return every figure, under a name with its unit."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_up_index(root, "train", TRAIN)
        make_up_index(root, "val", VAL)
        memory = in_a_fresh_process(rank_memory, root)
        train, val = open_folder(root, "train"), open_folder(root, "val")

    def permute() -> None:
        permutation(1, 0, TRAIN)

    alone = [longest_stall_ms(lambda: time.sleep(0.2)) for _ in range(repetitions)]
    beside = [longest_stall_ms(permute) for _ in range(repetitions)]
    results: dict[str, Any] = {
        "images": TRAIN,
        "permutation_ms": spread(milliseconds(permute, repetitions)),
        "longest_stall_meanwhile_ms": spread(beside),
        "longest_stall_without_it_ms": spread(alone),
    }
    for ranks, micro_batch in CASES:
        waits = [waits_ms(train, val, ranks, micro_batch) for _ in range(3)]
        name = f"{ranks}_ranks_of_{micro_batch}_images"
        share = [sum(run) / len(run) / (micro_batch / NEED * 1e3) * 100 for run in waits]
        results[f"{name}_share_of_step_percent"] = spread(share)
        results[f"{name}_longest_wait_ms"] = spread([max(run) for run in waits])
    return results | memory


if __name__ == "__main__":
    main()
