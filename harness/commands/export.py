"""`harness export`: a trained network in a file, or in a folder for model hubs."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.parsing import Subparsers
from harness.errors import FINISHED, UserError
from harness.startup import import_quickly


def add(commands: Subparsers) -> None:
    """Add the command to the parser."""
    export = commands.add_parser("export", help="write the trained network of a run")
    export.add_argument("run", type=Path, metavar="RUN|CHECKPOINT")
    export.add_argument(
        "--to",
        type=Path,
        required=True,
        metavar="FILE|DIR",
        help="a file .pt, .pth, .safetensors or .onnx; a new folder with --format hub",
    )
    export.add_argument(
        "--format", choices=["hub"], help="hub: a folder that timm loads, with a model card"
    )
    export.add_argument(
        "--data", type=Path, metavar="DIR", help="images to check an .onnx file on (default: val)"
    )
    export.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    if options.data and options.to.suffix != ".onnx":
        raise UserError("--data: only an .onnx file is checked on images; remove it")
    import_quickly("harness.deployment.export")
    from harness.deployment.export import export_trained
    from harness.execution.trained_model import load_trained

    hub = options.format == "hub"
    print(export_trained(load_trained(options.run), options.to, hub, options.data))
    return FINISHED
