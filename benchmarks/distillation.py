"""What a teacher brings and costs: errors on the digits, and the cache's break-even.

    python -m benchmarks.distillation digits --data DIR --tenth DIR [--write]
    python -m benchmarks.distillation cost [--repetitions 20] [--write]

DIR: what `harness data digits` makes, for the teacher, and with `--labelled 0.1` for the students.

digits: a ResNet-8 of width 8, 143 labelled and 1,294 unlabelled images, taught by the quickstart's
network, as in configs/distill/quickstart.yaml; and the same network on the 143 images alone, kn =
128, for as many steps, at three learning rates, of which the best is the baseline. 5 seeds each.

cost: seconds of a step of a ResNet-20 at 32 x 32 alone, with a live ResNet-56 and with its cached
logits, alternating in one process; how many students make the cache pay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.conditions import spread, write_results
from benchmarks.step import case_config, make_batches
from harness.config import Config, Distill, load_config
from harness.data.loader import Batch, open_loader
from harness.distributed import World, world_from_environment
from harness.evaluate import Evaluation
from harness.journal import read_log
from harness.models import build_model
from harness.objective import build_objective
from harness.soft_targets import CachedTeacher, Rows, all_shards
from harness.step import Step, set_precision
from harness.teacher import AnyTeacher, Teacher, load_teacher
from harness.train import prepare, train

SEEDS = (1, 2, 3, 4, 5)
LRS = (0.05, 0.1, 0.2)  # at 32 images; the peak is four times that at kn = 128
TEACHER, STUDENT = "configs/quickstart.yaml", "configs/distill/quickstart.yaml"
# the labelled images alone: 143 // 128 = 1 step an epoch, so epochs are the student's steps
ALONE = ["distill=null", "data.unlabelled_images=0", "recipe.minibatch=128", "recipe.epochs=300"]
ALONE += ["recipe.warmup_epochs=25", "recipe.milestones=[150, 225, 270]"]
ALONE += ["run.evaluate_every_epochs=5"]


def digits(data: Path, tenth: Path, processes: int) -> dict[str, Any]:
    """Errors in % of all runs, and the curves of validation error against steps."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        machine = ["run.loader=memory", "run.device=cpu"]
        teacher = train(load_config(TEACHER, [*machine, f"run.data_root={data}"]), work / "teacher")
        print(f"teacher: {teacher.error:.2f} %")
        machine += [f"run.data_root={tenth}"]
        taught = [*machine, f"distill.teacher={teacher.folder}"]
        variants = {"distilled": taught}
        for lr in LRS:
            variants[f"labels alone, lr {lr}"] = [*machine, *ALONE, f"recipe.reference_lr={lr}"]
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            runs = {
                (name, seed): pool.submit(_run, [*keys, f"seed={seed}"], work / name / str(seed))
                for name, keys in variants.items()
                for seed in SEEDS
            }
        results = {key: run.result() for key, run in runs.items()}
        rows = {name: _summary(name, [results[name, seed] for seed in SEEDS]) for name in variants}
    return {"teacher_error": teacher.error, "students": rows}


def _run(keys: list[str], out: Path) -> tuple[float, dict[int, float]]:
    """The error, and the curve: validation error in % by step."""
    torch.set_num_threads(1)
    result = train(load_config(STUDENT, keys), out)
    log = read_log(result.folder / "log.jsonl")
    return result.error, {x["step"]: x["error"] for x in log if x["event"] == "evaluation"}


def _summary(name: str, runs: list[tuple[float, dict[int, float]]]) -> dict[str, Any]:
    errors, curves = zip(*runs, strict=True)
    mean, std = statistics.mean(errors), statistics.stdev(errors)
    print(f"{name}: {mean:.2f} ± {std:.2f} %  {[round(e, 2) for e in errors]}", flush=True)
    curve = [[step, statistics.mean(c[step] for c in curves)] for step in sorted(curves[0])]
    return {"errors": errors, "mean": mean, "std": std, "mean_curve": curve}


def logits_lost(data: Path, teacher_run: Path) -> dict[str, Any]:
    """Largest and mean difference of the softened targets, of float16 and of the largest k."""
    keys = ["run.loader=memory", "run.device=cpu", f"run.data_root={data}"]
    config = load_config(TEACHER, keys)
    distill = Distill(teacher=str(teacher_run), precision="float32")
    config = config.model_copy(update={"distill": distill})
    feed, config = prepare(config, world_from_environment("cpu"))
    loader = open_loader(config, feed, "memory", 0, False)
    teacher = load_teacher(config, feed.train.classes)
    batches = loader.train(0)
    logits = torch.cat([teacher(0, next(batches)) for _ in range(5)])
    loader.close()
    lost = {}
    for dtype, top in [("float16", None), ("float16", 5), ("float16", 3)]:
        rows = Rows(10, dtype, top)
        kept = torch.from_numpy(rows.decode(rows.encode(logits)))
        name = dtype if top is None else f"{dtype}, top {top}"
        lost[name] = {
            f"T = {t}": {"largest": float(gap.max()), "mean": float(gap.mean())}
            for t in (1, 4, 20)
            for gap in [((logits / t).softmax(1) - (kept / t).softmax(1)).abs().sum(1) / 2]
        }
    return {"images": len(logits), "total_variation_of_targets": lost}


def cost(repetitions: int) -> dict[str, Any]:
    """Medians of alternating blocks, and the break-even that follows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = case_config("resnet20", 32, 32, 4, 4)
    distill = Distill(teacher="a ResNet-56", precision="float32")
    distilled = config.model_copy(update={"distill": distill})
    network = build_model(case_config("resnet56", 32, 32, 4, 4))
    live = Teacher(distilled, network)
    images, epochs = config.data.train_images, 2
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(10, "float16", None)
        cached = _synthetic_cache(distilled, Path(folder), rows, images, epochs)
        blocks = {
            "alone": _block(config, None, images, device),
            "live": _block(distilled, live, images, device),
            "cached": _block(distilled, cached, images, device),
            "teacher": _teacher_block(config, live, images, device),
        }
        times: dict[str, list[float]] = {name: [] for name in blocks}
        for repetition in range(repetitions + 1):
            for name, block in blocks.items():
                begun = time.perf_counter()
                block(10)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if repetition:  # the first warms up
                    times[name].append((time.perf_counter() - begun) / 10)
    step_s = {name: spread(values) for name, values in times.items()}
    saved_s = step_s["live"]["median"] - step_s["cached"]["median"]
    # E cached epochs cost E epochs of the teacher alone; a student of S epochs saves S of its part
    students = step_s["teacher"]["median"] / saved_s
    print({name: round(1000 * value["median"], 1) for name, value in step_s.items()}, "ms a step")
    print(f"break-even: {students:.2f} * (cached epochs / epochs of a student) students")
    return {
        "student": "resnet20",
        "teacher": "resnet56",
        "pixels": 32,
        "minibatch": config.recipe.minibatch,
        "step_s": step_s,
        "students_to_break_even_where_all_epochs_are_cached": students,
        "cache_bytes_an_image_and_epoch": rows.type.itemsize,
        "imagenet_float16_gb_an_epoch": Rows(1000, "float16", None).type.itemsize * 1281167 / 1e9,
    }


def _synthetic_cache(
    config: Config, folder: Path, rows: Rows, images: int, epochs: int
) -> CachedTeacher:
    shards = all_shards(epochs, images)
    for shard in shards:
        np.save(folder / shard.name, rows.encode(torch.randn(shard.end - shard.first, 10)))
    manifest = asdict(rows) | {"epochs": epochs, "images": images}
    return CachedTeacher(
        config, folder, manifest | {"evaluation": asdict(Evaluation(0, 0, 1, 0.0))}
    )


def _numbered(config: Config, images: int) -> Callable[[], Batch]:
    """Random batches, each time under other image ids, from all over the data set."""
    batches, generator = itertools.cycle(make_batches(config)), np.random.default_rng(0)

    def following() -> Batch:
        batch = next(batches)
        ids = torch.from_numpy(generator.integers(0, images, len(batch.labels)))
        return Batch(batch.images, batch.labels, ids, [])

    return following


def _block(
    config: Config, teacher: AnyTeacher | None, images: int, device: torch.device
) -> Callable[[int], None]:
    world = World(0, 1, 0, 1, "alone", device)
    if teacher is not None:
        teacher.to(device)
    model = build_model(config, channels_last=device.type == "cuda").to(device)
    step = Step(config, model, world, [range(4)], build_objective(config, teacher))
    following, numbers = _numbered(config, images), itertools.count()

    def block(steps: int) -> None:
        for _ in range(steps):
            step(next(numbers), iter([following()]))
        step.metrics.read()

    return block


def _teacher_block(
    config: Config, teacher: Teacher, images: int, device: torch.device
) -> Callable[[int], None]:
    following = _numbered(config, images)

    def block(steps: int) -> None:
        for _ in range(steps):
            teacher(0, following()).cpu()

    return block


def main() -> None:
    """--write keeps the part's figures in benchmarks/results/distillation_PART.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("part", choices=["digits", "cost", "lost"])
    parser.add_argument("--data", type=Path, default=Path("data/digits"))
    parser.add_argument("--tenth", type=Path, default=Path("data/digits_tenth"))
    parser.add_argument("--teacher", type=Path, default=Path("runs/quickstart"), help="run folder")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    set_precision("float32")
    if options.part == "digits":
        content = digits(options.data, options.tenth, options.processes)
    elif options.part == "lost":
        content = logits_lost(options.data, options.teacher)
        print(json.dumps(content, indent=2))
    else:
        content = cost(options.repetitions)
    if options.write:
        print(write_results(f"distillation_{options.part}", content))


if __name__ == "__main__":
    main()
