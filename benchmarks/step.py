"""Images/s of the harness' step against a bare PyTorch loop, alternating in one process.

    python -m benchmarks.step [--repetitions 30] [--block-seconds 0.5] [--write]

Both train the same network from the same uint8 batches in memory, with the same number of
threads. The bare loop is what one would write by hand: stock batch norm (with several workers a
step the same ghost batch norm, as no stock one computes the same), mean cross entropy,
SGD with Nesterov momentum, and nothing read, counted, checked or logged. The harness' side is all
that it does in a step, and a log line's reading of the metrics every 20 steps.
The figure is the ratio of each pair of neighbouring blocks: their order alternates, so that a
machine that slows down for a while slows both.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.conditions import spread, write_results
from harness.config import Config, config_from_mapping
from harness.data.loader import Batch
from harness.distributed import World
from harness.models import build_model
from harness.models.ghost_batch_norm import GhostBatchNorm2d
from harness.recipe.minibatch import Minibatch
from harness.step import Step, set_precision

LOG_EVERY_STEPS = 20
# model, pixels, images a worker (n), workers a step (k), workers a micro-batch (m)
CASES = [
    ("resnet8", 16, 32, 1, 1),  # 6 ms a step: what a step costs beside the network
    ("resnet8", 16, 32, 8, 8),  # the quickstart's step
    ("resnet20", 32, 128, 1, 1),
    ("resnet50", 64, 32, 1, 1),
]


def case_config(model: str, pixels: int, worker_batch: int, workers: int, micro: int) -> Config:
    """A config of so many steps that the schedule never ends."""
    return config_from_mapping(
        {
            "expect": {"error": 100, "source": "no training"},
            "data": {
                "train_images": worker_batch * workers * 1000,
                "val_images": 1,
                "classes": 10,
                "crop": pixels,
                "resize": pixels,
            },
            "model": {"name": model},
            "recipe": {
                "minibatch": worker_batch * workers,
                "worker_batch": worker_batch,
                "epochs": 90,
                "reference_minibatch": worker_batch * workers,
            },
            "run": {"micro_batch": worker_batch * micro},
        },
        "benchmarks/step.py",
    )


def make_batches(config: Config) -> list[Batch]:
    """Eight micro-batches of random pixels."""
    generator = torch.Generator().manual_seed(0)
    size = int(config.run.micro_batch)
    shape = (size, 3, config.data.crop, config.data.crop)
    return [
        Batch(
            images=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            labels=torch.randint(0, config.data.classes, (size,), generator=generator),
            ids=torch.arange(size),
            replaced=[],
        )
        for _ in range(8)
    ]


def stock_model(config: Config, channels_last: bool) -> nn.Module:
    """The same network with PyTorch's own batch norm."""
    model = build_model(config, channels_last=channels_last)
    for name, module in list(model.named_modules()):
        if isinstance(module, GhostBatchNorm2d):
            stock = nn.BatchNorm2d(module.num_features)
            stock.load_state_dict(module.state_dict())
            model.set_submodule(name, stock)
    return model


def bare_block(
    config: Config, batches: Iterator[Batch], device: torch.device
) -> Callable[[int], None]:
    """A loop as one writes it by hand."""
    cuda = device.type == "cuda"
    layout = torch.channels_last if cuda else torch.contiguous_format
    network = stock_model if config.workers == 1 else build_model
    model = network(config, channels_last=cuda).to(device).to(memory_format=layout)
    recipe = config.recipe
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.reference_lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=cuda or None,
    )
    mean = torch.tensor(config.data.mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(config.data.std, device=device).view(1, 3, 1, 1)

    def block(steps: int) -> None:
        for _ in range(steps):
            batch = next(batches)
            images = batch.images.to(device, non_blocking=True).to(
                torch.float32, memory_format=layout
            )
            images = images.div_(255).sub_(mean).div_(std)
            loss = F.cross_entropy(model(images), batch.labels.to(device, non_blocking=True))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return block


def harness_block(
    config: Config, batches: Iterator[Batch], device: torch.device
) -> Callable[[int], None]:
    """The harness' own step, with the reading of its metrics."""
    cuda = device.type == "cuda"
    layout = torch.channels_last if cuda else torch.contiguous_format
    model = build_model(config, channels_last=cuda).to(device).to(memory_format=layout)
    world = World(0, 1, 0, 1, "alone", device)
    minibatch = Minibatch(config.workers, config.recipe.worker_batch)
    micro_batches = minibatch.micro_batches(0, 1, int(config.run.micro_batch))
    step = Step(config, model, world, micro_batches)
    numbers = itertools.count()

    def block(steps: int) -> None:
        for _ in range(steps):
            number = next(numbers) % config.total_steps
            step(number, batches)
            if number % LOG_EVERY_STEPS == 0:
                step.metrics.read()

    return block


def seconds(block: Callable[[int], None], steps: int, device: torch.device) -> float:
    """Seconds of a block of steps, the device's work included."""
    start = time.perf_counter()
    block(steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    case: tuple[str, int, int, int, int], repetitions: int, block_s: float
) -> dict[str, Any]:
    """Alternating blocks; ratio > 1 means that the harness is faster."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = case_config(*case)
    batches = make_batches(config)
    ours = harness_block(config, itertools.cycle(batches), device)
    bare = bare_block(config, itertools.cycle(batches), device)
    warm_up_steps = 3
    slowest_s = max(seconds(block, warm_up_steps, device) for block in (ours, bare, ours, bare))
    steps = max(round(block_s / slowest_s * warm_up_steps), 2)
    ratios, ours_s, bare_s = [], [], []
    for repetition in range(repetitions):
        times = {}
        for block in (ours, bare) if repetition % 2 else (bare, ours):
            times[block] = seconds(block, steps, device)
        ours_s.append(times[ours])
        bare_s.append(times[bare])
        ratios.append(times[bare] / times[ours])
    images = steps * config.recipe.minibatch
    name, pixels, worker_batch, workers, micro = case
    return {
        "model": name,
        "pixels": pixels,
        "worker_batch": worker_batch,
        "workers": workers,
        "workers_a_micro_batch": micro,
        "steps_a_block": steps,
        "ratio": spread(ratios),
        "harness_images_per_s": images / spread(ours_s)["median"],
        "bare_images_per_s": images / spread(bare_s)["median"],
    }


def main() -> None:
    """Prints a table; --write keeps it in benchmarks/results/step.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--block-seconds", type=float, default=0.5)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    set_precision("float32")
    rows = []
    print("model     pixels    n   k   harness / bare   (quartiles)      images/s: harness, bare")
    for case in CASES:
        row = compare(case, options.repetitions, options.block_seconds)
        rows.append(row)
        ratio = row["ratio"]
        print(
            f"{row['model']:9} {row['pixels']:6} {row['worker_batch']:4} {row['workers']:3}   "
            f"{ratio['median']:14.3f}   ({ratio['quartile_1']:.3f}, {ratio['quartile_3']:.3f})   "
            f"{row['harness_images_per_s']:8.0f}, {row['bare_images_per_s']:8.0f}",
            flush=True,
        )
    if options.write:
        print(write_results("step", {"precision": "float32", "cases": rows}))


if __name__ == "__main__":
    main()
