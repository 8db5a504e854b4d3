"""`harness eval`: evaluate a run or a checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from harness.commands.parsing import Subparsers
from harness.errors import FINISHED, UserError
from harness.startup import import_quickly

if TYPE_CHECKING:
    from harness.deployment.predictions import ClassErrors

SHOWN = 50  # classes


def add(commands: Subparsers) -> None:
    """Add the command to the parser."""
    evaluate = commands.add_parser("eval", help="evaluate a run or a checkpoint")
    evaluate.add_argument("run", type=Path, metavar="RUN|CHECKPOINT")
    evaluate.add_argument("overrides", nargs="*", metavar="run.key=value")
    evaluate.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="any other images, in DIR/CLASS/ or beside a CSV of file and class",
    )
    evaluate.add_argument("--json", action="store_true", help="print the result as JSON")
    evaluate.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE.csv",
        help="write each image's prediction and, beside it, class errors and a confusion matrix",
    )
    evaluate.add_argument(
        "--recalibrate",
        type=int,
        metavar="N",
        help="take batch norm's statistics from N training images (run.recalibrate_images)",
    )
    evaluate.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    if options.data and any(o.startswith("run.data_root=") for o in options.overrides):
        raise UserError("--data and run.data_root both name images; give one of them")
    import_quickly("harness.deployment.evaluation")
    from harness.deployment.evaluation import evaluate_trained
    from harness.deployment.predictions import files_beside
    from harness.execution.trained_model import load_trained

    if options.recalibrate is not None:
        options.overrides.append(f"run.recalibrate_images={options.recalibrate}")
    trained = load_trained(options.run, options.overrides)
    evaluation, predictions = evaluate_trained(trained, options.predictions, options.data)
    recalibrated = trained.config.run.recalibrate_images
    classes = predictions.by_class() if predictions else []
    low, high = evaluation.error_interval()
    if options.json:
        keys = ("error", "top5_error", "correct", "total")
        result = {key: getattr(evaluation, key) for key in keys}
        result |= {"error_interval_95": [low, high], "recalibrate_images": recalibrated}
        if predictions:
            result["classes"] = {c.name: {"images": c.images, "wrong": c.wrong} for c in classes}
        print(json.dumps(result))
        return FINISHED
    print(f"error {evaluation.error:.2f} % (95 % interval {low:.2f} to {high:.2f} %)")
    print(f"top-5 error {evaluation.top5_error:.2f} %")
    if recalibrated:
        print(f"running statistics from {recalibrated:,} training images")
    print(f"{evaluation.correct} of {evaluation.total} images correct")
    if predictions:
        print("\n".join(_by_class(classes)))
        print("written", *map(str, (options.predictions, *files_beside(options.predictions))))
    return FINISHED


def _by_class(classes: list[ClassErrors]) -> Iterator[str]:
    """Yield a line for each class, the largest error first."""
    worst = sorted(classes, key=lambda found: -found.error)[:SHOWN]
    width = max(len("class"), *(len(found.name) for found in worst))
    yield f"{'class':{width}}  {'images':>7}  {'error':>8}  mostly taken for"
    for found in worst:
        row = f"{found.name:{width}}  {found.images:>7,}  {found.error:>6.2f} %  {found.taken_for}"
        yield row.rstrip()
    if len(classes) > SHOWN:
        yield f"and {len(classes) - SHOWN} more classes, with smaller errors"
