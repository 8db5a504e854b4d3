"""`harness eval`: evaluate a run or a checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from harness.commands.parsing import Subparsers
from harness.errors import FINISHED
from harness.startup import import_quickly


def add(commands: Subparsers) -> None:
    """Add the command to the parser."""
    evaluate = commands.add_parser("eval", help="evaluate a run or a checkpoint")
    evaluate.add_argument("run", type=Path, metavar="RUN|CHECKPOINT")
    evaluate.add_argument("overrides", nargs="*", metavar="run.key=value")
    evaluate.add_argument("--json", action="store_true")
    evaluate.add_argument("--predictions", type=Path, metavar="FILE.csv")
    evaluate.add_argument(
        "--recalibrate",
        type=int,
        metavar="N",
        help="take batch norm's statistics from N training images (run.recalibrate_images)",
    )
    evaluate.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    import_quickly("harness.execution.trained_model")
    from harness.execution.trained_model import evaluate_trained, load_trained

    if options.recalibrate is not None:
        options.overrides.append(f"run.recalibrate_images={options.recalibrate}")
    trained = load_trained(options.run, options.overrides)
    evaluation = evaluate_trained(trained, options.predictions)
    recalibrated = trained.config.run.recalibrate_images
    low, high = evaluation.error_interval()
    if options.json:
        keys = ("error", "top5_error", "correct", "total")
        values = {key: getattr(evaluation, key) for key in keys}
        values |= {"error_interval_95": [low, high], "recalibrate_images": recalibrated}
        print(json.dumps(values))
        return FINISHED
    print(f"error {evaluation.error:.2f} % (95 % interval {low:.2f} to {high:.2f} %)")
    print(f"top-5 error {evaluation.top5_error:.2f} %")
    if recalibrated:
        print(f"running statistics from {recalibrated:,} training images")
    print(f"{evaluation.correct} of {evaluation.total} images correct")
    return FINISHED
