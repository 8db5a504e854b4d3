"""`harness report`: summarize runs and studies in one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.parsing import Subparsers
from harness.errors import FINISHED


def add(commands: Subparsers) -> None:
    """Add the command to the parser."""
    report = commands.add_parser("report", help="summarize runs and studies in one HTML file")
    report.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN|STUDY|SCALING.json", help="what to report"
    )
    report.add_argument("--to", type=Path, required=True, metavar="FILE.html", help="output file")
    report.add_argument(
        "--assets", type=Path, metavar="DIR", help="also write each figure as SVG and CSV"
    )
    report.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from harness.report import write_report

    print(write_report(options.runs, options.to, options.assets))
    return FINISHED
