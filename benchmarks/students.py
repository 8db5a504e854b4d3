"""The benefit of a teacher: validation errors of students with and without one, on real images.

    python -m benchmarks.students digits --data DIR --tenth DIR [--work DIR] [--write]
    python -m benchmarks.students cifar10 --data DIR [--seeds 1] [--work DIR] [--write]

digits: the folders are from `harness data digits`, for the teacher, and with `--labelled 0.1` for
the students. A ResNet-8 of width 8, 143 labelled and 1,294 unlabelled images, taught by the
quickstart's network, as in configs/distill/quickstart.yaml; and the same network on the 143 images
alone, kn = 128, for as many steps, at three learning rates, the best of which is the baseline.

cifar10: DIR is from `harness data cifar10`; the first 1,000 images of each class train, the
first 500 of each validate. A ResNet-8 of width 8 alone, and taught by a ResNet-20 of width 8 at
T = 1, 4 and 20 from one cache of all logits in float16; for the first seed at T = 4 also by the
live teacher.

Every run has a folder in WORK: after an interruption, the same command continues.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.conditions import write_results
from harness.config.loading import load_config
from harness.runs.logging.jsonl import read_log
from harness.training.setup import cache_soft_targets, train

MACHINE = ["run.loader=memory", "run.device=cpu"]
Variants = Mapping[str, list[str]]  # name -> overrides
Curve = dict[int, float]  # validation error in % by step
Finished = dict[tuple[str, int], tuple[float, Curve]]  # by variant and seed

DIGITS = "configs/distill/quickstart.yaml"
LRS = (0.05, 0.1, 0.2)  # at 32 images; the peak is four times that at kn = 128
# the labelled images alone: 143 // 128 = 1 step per epoch, so epochs are the student's steps
ALONE = ["distill=null", "data.unlabelled_images=0", "recipe.minibatch=128", "recipe.epochs=300"]
ALONE += ["recipe.warmup_epochs=25", "recipe.milestones=[150, 225, 270]"]
ALONE += ["run.evaluate_every_epochs=5"]

CIFAR10 = "configs/distill/cifar10_resnet20.yaml"
CIFAR10_EPOCHS = 10
TRAIN_PER_CLASS, VAL_PER_CLASS = 1000, 500
SUBSET = [f"data.train_images={10 * TRAIN_PER_CLASS}", f"data.val_images={10 * VAL_PER_CLASS}"]
STUDENT = ["model={name: resnet8, width: 8}", f"recipe.epochs={CIFAR10_EPOCHS}"]
STUDENT += ["recipe.milestones=[5, 8]", "distill.precision=float32"]
TEACHER = ["model={name: resnet20, width: 8}", "recipe.epochs=15", "recipe.milestones=[8, 12]"]
TEACHER += ["run.evaluate_every_epochs=5"]


def digits(
    data: Path, tenth: Path, work: Path, seeds: Sequence[int], processes: int
) -> dict[str, Any]:
    """Return errors in % of all runs, and the curves of validation error against steps."""
    keys = [*MACHINE, f"run.data_root={data}"]
    teacher, _ = run("configs/quickstart.yaml", keys, work / "teacher")
    machine = [*MACHINE, f"run.data_root={tenth}"]
    variants = {"distilled": [*machine, f"distill.teacher={work / 'teacher'}"]}
    for lr in LRS:
        variants[f"labels alone, lr {lr}"] = [*machine, *ALONE, f"recipe.reference_lr={lr}"]
    finished = run_all(DIGITS, variants, seeds, work, processes)
    return {"teacher_error": teacher, "seeds": [*seeds], "students": summary(variants, finished)}


def cifar10(data: Path, work: Path, seeds: Sequence[int], processes: int) -> dict[str, Any]:
    """Return the same as `digits`, for students of a cache and of the live teacher."""
    machine = [*MACHINE, f"run.data_root={subset(data, work / 'data')}", *SUBSET]
    teacher, _ = run("configs/cifar10/resnet56_128.yaml", [*machine, *TEACHER], work / "teacher")
    base = [*machine, *STUDENT]
    taught = [*base, f"distill.teacher={work / 'teacher'}"]
    finished: Finished = {}
    for seed in seeds:
        cached = [*taught, f"distill.cache={cache(taught, seed, work)}"]
        variants = {"alone": [*base, "distill=null"]}
        for temperature in (1, 4, 20):
            variants[f"cached, T = {temperature}"] = [*cached, f"distill.temperature={temperature}"]
        if seed == seeds[0]:
            variants["live, T = 4"] = [*taught, "distill.temperature=4"]
        finished |= run_all(CIFAR10, variants, [seed], work, processes)
    names = list(dict.fromkeys(name for name, _ in finished))
    return {"teacher_error": teacher, "seeds": [*seeds], "students": summary(names, finished)}


def subset(data: Path, folder: Path) -> Path:
    """Create an image folder of the first images of each class."""
    for split, count in (("train", TRAIN_PER_CLASS), ("val", VAL_PER_CLASS)):
        for source in sorted((data / split).iterdir()):
            target = folder / split / source.name
            if not target.exists():
                partial = folder / "partial"
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                for image in sorted(source.iterdir())[:count]:
                    shutil.copy(image, partial)
                target.parent.mkdir(exist_ok=True)
                partial.rename(target)
    return folder


def cache(keys: list[str], seed: int, work: Path) -> Path:
    """Cache the teacher's logits of every crop of a run of this seed, unless they exist."""
    folder = work / f"cache-{seed}"
    if not (folder / "manifest.json").exists():
        config = load_config(CIFAR10, [*keys, f"seed={seed}", f"distill.cache={folder}"])
        cache_soft_targets(config, [], CIFAR10_EPOCHS, "float16", None)
    return folder


def run_all(
    path: str, variants: Variants, seeds: Sequence[int], work: Path, processes: int
) -> Finished:
    """Run each variant with each seed, several at a time."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        runs = {
            (name, seed): pool.submit(run, path, [*keys, f"seed={seed}"], folder)
            for name, keys in variants.items()
            for seed in seeds
            for folder in [work / name.replace(" ", "-") / str(seed)]
        }
        return {key: run.result() for key, run in runs.items()}


def run(path: str, keys: list[str], folder: Path) -> tuple[float, Curve]:
    """Return a run's error and curve; a finished run is not repeated."""
    torch.set_num_threads(1)
    error = train(load_config(path, keys), folder, resume=True).error
    log = read_log(folder / "log.jsonl")
    return error, {x["step"]: x["error"] for x in log if x["event"] == "evaluation"}


def summary(names: Sequence[str] | Variants, finished: Finished) -> dict[str, Any]:
    """Return each variant's mean and standard deviation of the error in %, and its mean curve."""
    rows: dict[str, Any] = {}
    for name in names:
        errors, curves = zip(*(r for (n, _), r in finished.items() if n == name), strict=True)
        mean = statistics.mean(errors)
        std = statistics.stdev(errors) if len(errors) > 1 else None
        curve = [[step, statistics.mean(c[step] for c in curves)] for step in sorted(curves[0])]
        rows[name] = {"errors": errors, "mean": mean, "std": std, "mean_curve": curve}
        spread = "" if std is None else f" ± {std:.2f}"
        print(f"{name}: {mean:.2f}{spread} %  {[round(e, 2) for e in errors]}", flush=True)
    return rows


def main() -> None:
    """Print the figures; --write stores them in benchmarks/results/students_PART.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("part", choices=["digits", "cifar10"])
    parser.add_argument("--data", type=Path, help="data/digits or data/cifar10")
    parser.add_argument("--tenth", type=Path, default=Path("data/digits_tenth"))
    parser.add_argument("--work", type=Path, default=Path("runs/students"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    data, work = options.data or Path("data") / options.part, options.work / options.part
    if options.part == "digits":
        content = digits(data, options.tenth, work, options.seeds, options.processes)
    else:
        content = cifar10(data, work, options.seeds, options.processes)
    if options.write:
        print(write_results(f"students_{options.part}", content))
    else:
        print(json.dumps(content["teacher_error"]))


if __name__ == "__main__":
    main()
