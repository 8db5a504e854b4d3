"""`harness predict`: the most probable classes of images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from harness.commands.parsing import Subparsers
from harness.errors import FINISHED
from harness.startup import import_quickly


def add(commands: Subparsers) -> None:
    """Add the command to the parser."""
    predict = commands.add_parser("predict", help="say what a trained network sees in images")
    predict.add_argument("run", type=Path, metavar="RUN|CHECKPOINT")
    predict.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE|FOLDER", help="folders with all below them"
    )
    predict.add_argument("--top", type=int, default=5, metavar="K", help="classes to show (5)")
    predict.add_argument("--json", action="store_true", help="print the predictions as JSON")
    predict.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    import_quickly("harness.deployment.prediction")
    from harness.deployment.prediction import predict
    from harness.execution.trained_model import load_trained

    # a photo needs no training images beside it
    trained = load_trained(options.run, ["run.recalibrate_images=0"])
    found = predict(trained, options.images, options.top)
    if options.json:
        rows = [
            {"path": one.path, "classes": [{"class": c, "probability": p} for c, p in one.classes]}
            for one in found
        ]
        print(json.dumps(rows, indent=2))
        return FINISHED
    for one in found:
        likely = ", ".join(f"{name} {100 * share:.1f} %" for name, share in one.classes)
        print(f"{one.path}: {likely}")
    return FINISHED
