"""`harness eval`: evaluate a run or a checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from harness.commands.parsing import Subparsers
from harness.errors import (
    FINISHED,
)
from harness.startup import import_quickly


def add(commands: Subparsers) -> None:
    """Add the command to the parser."""
    evaluate = commands.add_parser("eval", help="evaluate a run or a checkpoint")
    evaluate.add_argument("run", type=Path, metavar="RUN|CHECKPOINT")
    evaluate.add_argument("overrides", nargs="*", metavar="run.key=value")
    evaluate.add_argument("--json", action="store_true")
    evaluate.add_argument("--predictions", type=Path, metavar="FILE.csv")
    evaluate.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    import_quickly("harness.execution.trained_model")
    from harness.execution.trained_model import evaluate_trained, load_trained

    evaluation = evaluate_trained(load_trained(options.run, options.overrides), options.predictions)
    low, high = evaluation.error_interval()
    if options.json:
        keys = ("error", "top5_error", "correct", "total")
        print(
            json.dumps(
                {key: getattr(evaluation, key) for key in keys} | {"error_interval_95": [low, high]}
            )
        )
        return FINISHED
    print(f"error {evaluation.error:.2f} % (95 % interval {low:.2f} to {high:.2f} %)")
    print(f"top-5 error {evaluation.top5_error:.2f} %")
    print(f"{evaluation.correct} of {evaluation.total} images correct")
    return FINISHED
