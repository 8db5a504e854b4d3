"""A training pass with ghost batch norm, compared with batch norm over the whole micro-batch.

    python -m benchmarks.ghost_batch_norm [--repetitions 30] [--block-seconds 0.5] [--write]

Forward and backward pass of one network on the same images, alternating in one process: on a GPU
ResNet-50 at 224 pixels in bfloat16 and channels_last, where ghost batch norm is the fused kernel;
on a CPU ResNet-18 at 64 pixels in float32, in plain PyTorch. Both run eagerly and compiled block by
block, as in a run: then the compiler fuses plain batch norm with addition and ReLU.
The figure is time of plain / time of ghost of each pair of neighbouring blocks: 0.97 is 3 % slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.conditions import benchmark_parser, spread, write_results
from harness.config.loading import config_from_mapping
from harness.execution.compilation import compile_blocks, compiler_settings
from harness.execution.precision import set_precision
from harness.models.ghost_batch_norm import RunningStatistics, ghost_batch_norms, kernel_device
from harness.models.registry import build_model

WORKER_BATCH = 32  # n
# model, pixels, workers per micro-batch (m)
CASES = {
    "cuda": [("resnet50", 224, 1), ("resnet50", 224, 4), ("resnet50", 224, 8)],
    "cpu": [("resnet18", 64, 1), ("resnet18", 64, 4)],
}


def network(name: str, pixels: int, ghost: bool, compiled: bool, device: torch.device) -> nn.Module:
    """Build the harness's model, with plain instead of ghost batch norm unless `ghost`."""
    config = config_from_mapping(
        {
            "expect": {"error": 100, "source": "no training"},
            "data": {
                "train_images": 10**6,
                "val_images": 1,
                "classes": 1000,
                "crop": pixels,
                "resize": pixels,
            },
            "model": {"name": name},
            "recipe": {"minibatch": 256, "worker_batch": WORKER_BATCH, "epochs": 90},
        },
        "benchmarks/ghost_batch_norm.py",
    )
    cuda = device.type == "cuda"
    model = build_model(config, channels_last=cuda)
    if not ghost:
        names = {id(module): name for name, module in model.named_modules()}
        for norm in ghost_batch_norms(model):
            model.set_submodule(names[id(norm)], nn.BatchNorm2d(norm.num_features))
    layout = torch.channels_last if cuda else torch.contiguous_format
    model = model.to(device).to(memory_format=layout)
    if compiled:
        compile_blocks(model, name)
    return model


def make_block(model: nn.Module, images: torch.Tensor, compiled: bool) -> Callable[[int], float]:
    """Return the seconds of several passes, including the device's work."""
    cuda = images.device.type == "cuda"
    workers = len(images) // WORKER_BATCH
    statistics = RunningStatistics(model)

    def block(passes: int) -> float:
        start = time.perf_counter()
        for _ in range(passes):
            autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=cuda)
            with compiler_settings(compiled), autocast:
                loss = model(images).float().logsumexp(1).mean()
            loss.backward()
            statistics.update(workers)
            model.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return block


def compare(
    case: tuple[str, int, int], compiled: bool, repetitions: int, block_s: float
) -> dict[str, Any]:
    """Time alternating blocks; a ratio above 1 means that ghost batch norm is faster."""
    name, pixels, workers = case
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    images = torch.randn(workers * WORKER_BATCH, 3, pixels, pixels, device=device)
    images = images.to(memory_format=layout)
    ghost, plain = (
        make_block(network(name, pixels, kind, compiled, device), images, compiled)
        for kind in (True, False)
    )
    slowest_s = max([block(2) for block in (ghost, plain, ghost, plain)][2:])
    passes = max(round(block_s / slowest_s * 2), 1)
    ratios, ghost_s, plain_s = [], [], []
    for repetition in range(repetitions):
        times = {}
        for block in (ghost, plain) if repetition % 2 else (plain, ghost):
            times[block] = block(passes)
        ghost_s.append(times[ghost])
        plain_s.append(times[plain])
        ratios.append(times[plain] / times[ghost])
    count = passes * len(images)
    return {
        "model": name,
        "pixels": pixels,
        "workers_a_micro_batch": workers,
        "compiled": compiled,
        "passes_a_block": passes,
        "ratio": spread(ratios),
        "ghost_images_per_s": count / spread(ghost_s)["median"],
        "plain_images_per_s": count / spread(plain_s)["median"],
    }


def main() -> None:
    """Print a table; --write stores it in benchmarks/results/ghost_batch_norm.json."""
    parser = benchmark_parser(__doc__, repetitions=30)
    parser.add_argument("--block-seconds", type=float, default=0.5)
    options = parser.parse_args()
    set_precision("float32")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernel = "fused kernel" if kernel_device() == device else "plain PyTorch"
    print(f"ghost batch norm: {kernel}, n = {WORKER_BATCH}")
    print(
        "model     pixels   m  compiled   plain / ghost   (quartiles)      images/s: ghost, plain"
    )
    rows = []
    for case in CASES[device]:
        for compiled in (False, True):
            row = compare(case, compiled, options.repetitions, options.block_seconds)
            rows.append(row)
            ratio = row["ratio"]
            print(
                f"{row['model']:9} {row['pixels']:6} {row['workers_a_micro_batch']:3}  "
                f"{row['compiled']!s:8} {ratio['median']:15.3f}   "
                f"({ratio['quartile_1']:.3f}, {ratio['quartile_3']:.3f})   "
                f"{row['ghost_images_per_s']:9.0f}, {row['plain_images_per_s']:9.0f}",
                flush=True,
            )
    if options.write:
        precision = "bfloat16" if device == "cuda" else "float32"
        print(
            write_results(
                "ghost_batch_norm", {"precision": precision, "cases": rows}, options.write
            )
        )


if __name__ == "__main__":
    main()
