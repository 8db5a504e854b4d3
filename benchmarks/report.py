"""The time for a report of 100 runs of 90 epochs.

    python -m benchmarks.report [--repetitions 5] [--write] [--folder DIR]

The run folders are synthetic: ImageNet's size, the paper's recipe, with the log lines that a run
writes (one every 20 steps, and at each epoch's end) and falling errors. `kn_8192` is 20
variants of 5 seeds at the paper's minibatch; `sweep` is its figure 1, 64 to 65,536 images (11
minibatches, 9 or 10 seeds each), where a run of the smallest has about 90,000 lines. Each report is
made in its own process, like `harness report`; the time includes imports. --folder keeps the
run folders, or uses existing ones.
"""

from __future__ import annotations

import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from benchmarks.conditions import benchmark_parser, spread, write_results
from harness.config.loading import config_from_mapping, dump_config
from harness.config.schema import Config
from harness.recipe.schedule import lr_at

RUNS, EPOCHS = 100, 90
SWEEP = [2**power for power in range(6, 17)]


def made_up_config(minibatch: int, seed: int, label_smoothing: float = 0.0) -> Config:
    """Return the paper's recipe with a minibatch."""
    worker = {"worker_batch": 32, "label_smoothing": label_smoothing}
    mapping = {
        "seed": seed,
        "expect": {"error": 23.74, "std": 0.09, "source": "a made-up run"},
        "data": {"train_images": 1_281_167, "val_images": 50_000, "classes": 1000},
        "model": {"name": "resnet50"},
        "recipe": {"minibatch": minibatch, "epochs": EPOCHS} | worker,
    }
    return config_from_mapping(mapping, "benchmarks/report.py")


def made_up_log(config: Config) -> Iterator[dict[str, Any]]:
    """Yield the log lines of a run from start to finish."""
    dice = random.Random(f"{config.seed} {config.recipe.minibatch}")
    now = datetime(2026, 1, 1, tzinfo=timezone.utc)
    epoch, speed = config.steps_per_epoch, 20_000.0
    worse = 0.8 * max(math.log2(config.recipe.minibatch / 8192), 0) ** 2 + dice.gauss(0, 0.1)

    def line(event: str, step: int, **values: Any) -> dict[str, Any]:
        return {"event": event, "step": step, "time": now.isoformat("T", "milliseconds")} | values

    how = {"device": "cuda", "precision": "bfloat16", "loader": "dali", "micro_batch": 256}
    yield line("start", 0, incarnation=1, world_size=8, **how)
    for done in range(1, config.total_steps + 1):
        if done % 20 and done % epoch:
            continue
        now += timedelta(seconds=(20 if done % 20 == 0 else 10) * config.recipe.minibatch / speed)
        at, lr = done / epoch, lr_at(config, done - 1)
        error = 100 - 62 * (1 - math.exp(-at / 6)) - 8 * (at > 30) - 4 * (at > 60) - 1 * (at > 80)
        values = {"loss": error / 25, "error": error + dice.gauss(0, 0.3), "lr": lr}
        rates = {"images_per_s": speed + dice.gauss(0, 200), "data_wait": abs(dice.gauss(0, 0.01))}
        yield line("train", done, epoch=(done - 1) // epoch + 1, **values, **rates)
        if done % epoch == 0:
            error += worse - 1.5 + dice.gauss(0, 3 if at < 30 else 0.1)
            results = {"error": error, "top5_error": error / 3, "loss": error / 25}
            counts = {"correct": round(500 * (100 - error)), "total": 50_000}
            yield line("evaluation", done, epoch=done // epoch, **results, **counts)
            yield line("checkpoint", done, file=f"checkpoint-001-{done:08}.pt", seconds=0.4)
    yield line("finish", config.total_steps, error=error)


def make_up_run(folder: Path, config: Config) -> None:
    """Write a run folder."""
    folder.mkdir(parents=True)
    lines = list(made_up_log(config))
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    total = {"step": config.total_steps, "total_steps": config.total_steps}
    status = {"state": "finished", "error": lines[-1]["error"], "heartbeat": time.time()} | total
    (folder / "status.json").write_text(json.dumps(status))
    hardware = {"host": "made-up", "gpu": "none, made up", "gpus": 8, "cpus": 128}
    (folder / "environment.json").write_text(json.dumps({"hardware": hardware}))


def make_up_studies(root: Path) -> None:
    """Write the two studies of RUNS runs."""
    for number in range(RUNS):
        variant, seed = divmod(number, 5)
        folder = root / "kn_8192" / f"smoothing_{variant:02}" / f"{seed}"
        make_up_run(folder, made_up_config(8192, seed, variant / 20))
        seed, place = divmod(number, len(SWEEP))
        folder = root / "sweep" / f"{SWEEP[place]}" / f"{seed}"
        make_up_run(folder, made_up_config(SWEEP[place], seed))


def count_lines(study: Path) -> int:
    """Count the lines of all logs of a study."""
    return sum(path.read_bytes().count(b"\n") for path in study.glob("*/*/log.jsonl"))


def seconds(study: Path, to: Path) -> tuple[float, float]:
    """Return wall and processor seconds of one `harness report`."""
    command = [sys.executable, "-m", "harness", "report", str(study), "--to", str(to)]
    start_s, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    taken_s, after = time.perf_counter() - start_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    return taken_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print seconds; --write stores them in benchmarks/results/report.json."""
    parser = benchmark_parser(__doc__, repetitions=5)
    parser.add_argument("--folder", type=Path, metavar="DIR")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = options.folder or Path(folder)
        if not (root / "sweep").exists():
            make_up_studies(root)
        results: dict[str, Any] = {}
        for name in ("kn_8192", "sweep"):
            page, lines = root / f"{name}.html", count_lines(root / name)
            times = [seconds(root / name, page) for _ in range(options.repetitions)]
            taken, processor = (spread(column) for column in zip(*times, strict=True))
            size_mb = page.stat().st_size / 1e6
            results[name] = {"seconds": taken, "processor_seconds": processor}
            results[name] |= {"lines": lines, "page_mb": size_mb}
            print(
                f"{name:8} {RUNS} runs, {lines:,} log lines: {taken['median']:.2f} s "
                f"({processor['median']:.2f} s of processor time), {size_mb:.1f} MB"
            )
    if options.write:
        print(write_results("report", {"runs": RUNS, "epochs": EPOCHS} | results, options.write))


if __name__ == "__main__":
    main()
