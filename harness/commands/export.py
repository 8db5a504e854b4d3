"""`harness export`: a plain state dict of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.parsing import Subparsers
from harness.errors import (
    FINISHED,
)
from harness.startup import import_quickly


def add(commands: Subparsers) -> None:
    """Add the command to the parser."""
    export = commands.add_parser("export", help="write the plain state dict of a run")
    export.add_argument("run", type=Path, metavar="RUN|CHECKPOINT")
    export.add_argument(
        "--to", type=Path, required=True, metavar="FILE", help=".pt or .safetensors"
    )
    export.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    import_quickly("harness.deployment.export")
    from harness.deployment.export import export_trained
    from harness.execution.trained_model import load_trained

    print(export_trained(load_trained(options.run), options.to))
    return FINISHED
