"""The cost of a teacher, the savings of its cache, and the losses of float16 or top-K rows.

    python -m benchmarks.distillation [--teacher RUN] [--repetitions 20] [--write]

cost: a step of a ResNet-20 (128 images of 32 x 32) alone, with a live ResNet-56 and with its cached
logits, and the ResNet-56 by itself, which is the cost of writing a cache. Short blocks of each
alternate in one process; a figure is the ratio within a round. It uses processor time on a
CPU, with one thread, and wall time on a GPU. Batches are in memory: no image is decoded.

rounding: the distance of a cache's softened targets from the live ones, for all crops of the first
epoch of RUN's config (the quickstart's run, or any other): half the sum of |p - p'| over classes.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.conditions import benchmark_parser, spread, write_results
from benchmarks.loops import make_batches
from benchmarks.step import case_config
from harness.config.loading import load_config
from harness.config.schema import Config, DistillConfig
from harness.data.batch import Batch
from harness.data.loaders.choice import open_loader
from harness.distillation.logit_cache import CachedTeacher, Manifest, all_shards
from harness.distillation.logit_rows import Rows
from harness.distillation.teacher import AnyTeacher, Teacher, load_teacher
from harness.distributed import World, world_from_environment
from harness.execution.evaluation import Evaluation
from harness.execution.precision import set_precision
from harness.models.registry import build_model
from harness.training.objective import build_objective
from harness.training.ready_rank import prepare
from harness.training.replica import Replica
from harness.training.step import Step

STEPS_A_BLOCK = 2
CACHED_EPOCHS = 2
Block = Callable[[int], None]  # runs a number of steps


def cost(repetitions: int) -> dict[str, Any]:
    """Return ratios to a step without a teacher, and the resulting break-even point."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = case_config("resnet20", 32, 32, 4, 4)
    distilled = config.model_copy(
        update={"distill": DistillConfig(teacher="-", precision="float32")}
    )
    live = Teacher(distilled, build_model(case_config("resnet56", 32, 32, 4, 4)))
    rows = Rows(config.data.classes, "float16", None)
    with tempfile.TemporaryDirectory() as folder:
        cached = _synthetic_cache(distilled, Path(folder), rows)
        blocks = {
            "alone": _step_block(config, None, device),
            "live": _step_block(distilled, live, device),
            "cached": _step_block(distilled, cached, device),
            "teacher": _teacher_block(config, live),
        }
        rounds = _alternate(blocks, repetitions, device)
    ratios = {
        name: spread([times[name] / times["alone"] for times in rounds])
        for name in ("live", "cached", "teacher")
    }
    # E cached epochs cost E epochs of the teacher; a student of S epochs saves S of them
    students = spread([t["teacher"] / (t["live"] - t["cached"]) for t in rounds])
    for name, ratio in ratios.items():
        low, high = ratio["quartile_1"], ratio["quartile_3"]
        print(f"{name}: {ratio['median']:.3f} of a step alone (quartiles {low:.3f} to {high:.3f})")
    print(
        f"break-even: {students['median']:.2f} * E / S students, each of S epochs, E of them cached"
    )
    return {
        "student": "resnet20, 128 images of 32 x 32 a step",
        "teacher": "resnet56",
        "clock": "processor" if device.type == "cpu" else "wall",
        "step_alone_s": statistics.median(times["alone"] for times in rounds),
        "ratio_to_a_step_alone": ratios,
        "students_to_break_even_times_s_over_e": students,
        "cache_bytes_an_image_and_epoch": rows.type.itemsize,
        "imagenet_float16_gb_an_epoch": Rows(1000, "float16", None).type.itemsize * 1281167 / 1e9,
    }


def _alternate(
    blocks: dict[str, Block], repetitions: int, device: torch.device
) -> list[dict[str, float]]:
    """Return seconds per step of each, round by round, after a warm-up round."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    rounds = []
    for number in range(repetitions + 1):
        order = list(blocks) if number % 2 else list(reversed(blocks))
        times = {}
        for name in order:
            begun = clock()
            blocks[name](STEPS_A_BLOCK)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name] = (clock() - begun) / STEPS_A_BLOCK
        rounds.append(times)
    return rounds[1:]


def _synthetic_cache(config: Config, folder: Path, rows: Rows) -> CachedTeacher:
    images = config.data.train_images
    for shard in all_shards(CACHED_EPOCHS, images):
        logits = torch.randn(shard.end - shard.first, rows.classes)
        np.save(folder / shard.name, rows.encode(logits, temperature=1.0))
    manifest = Manifest(
        epochs=CACHED_EPOCHS,
        images=images,
        classes=rows.classes,
        dtype=rows.dtype,
        top=rows.top,
        evaluation=asdict(Evaluation(0, 0, 1, 0.0)),
        shards={},
    )
    return CachedTeacher(config, folder, manifest)


def _numbered(config: Config) -> Callable[[], Batch]:
    """Yield the random batches under changing image ids from the whole data set."""
    batches, generator = itertools.cycle(make_batches(config)), np.random.default_rng(0)

    def following() -> Batch:
        batch = next(batches)
        ids = generator.integers(0, config.data.train_images, len(batch.labels))
        return Batch(batch.images, batch.labels, torch.from_numpy(ids), [])

    return following


def _step_block(config: Config, teacher: AnyTeacher | None, device: torch.device) -> Block:
    if teacher is not None:
        teacher.to(device)
    model = build_model(config, channels_last=device.type == "cuda").to(device)
    world = World(0, 1, 0, 1, "alone", device)
    replica = Replica(config, model, world)
    step = Step(config, replica, [range(4)], build_objective(config, teacher))
    following, numbers = _numbered(config), itertools.count()

    def block(steps: int) -> None:
        for _ in range(steps):
            step(next(numbers), iter([following()]))
        step.metrics.read()

    return block


def _teacher_block(config: Config, teacher: Teacher) -> Block:
    following = _numbered(config)

    def block(steps: int) -> None:
        for _ in range(steps):
            teacher(0, following()).cpu()

    return block


def rounding(run: Path) -> dict[str, Any]:
    """Return the largest and mean total variation of the targets, for float16 and for top K."""
    logits = _first_epoch(run)
    classes = logits.shape[1]
    lost: dict[str, dict[str, Any]] = {}
    for top in (None, classes // 2, 3):
        rows = Rows(classes, "float16", top)
        name = "float16" if top is None else f"float16, top {top}"
        lost[name] = {}
        for t in (1, 2, 4, 20):
            kept = torch.from_numpy(rows.decode(rows.encode(logits, t)))
            gap = ((logits / t).softmax(1) - (kept / t).softmax(1)).abs().sum(1) / 2
            lost[name][f"T = {t}"] = {"largest": float(gap.max()), "mean": float(gap.mean())}
    print(json.dumps(lost, indent=2))
    model = load_config(run / "config.yaml").model
    teacher = {"model": model.name, "width": model.width}
    return teacher | {"images": len(logits), "total_variation_of_targets": lost}


def _first_epoch(run: Path) -> Tensor:
    """Return the run's logits, float32 (N, K), of the crops of its first epoch."""
    config = load_config(run / "config.yaml", ["run.loader=memory", "run.device=cpu"])
    distill = DistillConfig(teacher=str(run), precision="float32")
    config = config.model_copy(update={"distill": distill})
    batch_plan, config = prepare(config, world_from_environment("cpu"))
    loader = open_loader(config, batch_plan, "memory", 0, False)
    teacher, batches = load_teacher(config, batch_plan.train.classes), loader.train(0)
    micro_batches = config.steps_per_epoch * len(batch_plan.micro_batches)
    logits = torch.cat([teacher(0, next(batches)) for _ in range(micro_batches)])
    loader.close()
    return logits


def main() -> None:
    """Print the figures; --write stores them in benchmarks/results/distillation.json."""
    parser = benchmark_parser(__doc__, repetitions=20)
    parser.add_argument("--teacher", type=Path, nargs="*", default=[], help="run folders")
    options = parser.parse_args()
    set_precision("float32")
    torch.set_num_threads(1)
    content: dict[str, Any] = {"rounding": [rounding(run) for run in options.teacher]}
    content["cost"] = cost(options.repetitions)
    if options.write:
        print(write_results("distillation", content, options.write))


if __name__ == "__main__":
    main()
