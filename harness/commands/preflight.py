"""`harness preflight`: a minute of measurements that names the nodes that fall short."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from harness.commands.messages import failure, is_first_rank
from harness.commands.parsing import Subparsers
from harness.errors import FAILED, FINISHED, UserError
from harness.startup import import_quickly


def add(commands: Subparsers) -> None:
    """Add the command to the parser."""
    preflight = commands.add_parser("preflight", help="name nodes that are slow or different")
    preflight.add_argument("--data", type=Path, metavar="DIR", help="the images, to read some")
    preflight.add_argument("--folder", type=Path, metavar="DIR", help="for run folders, to write")
    preflight.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    preflight.add_argument("--json", action="store_true", help="print the figures as JSON")
    preflight.add_argument("--bad-nodes", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    preflight.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return 0 where all nodes are healthy, else 1."""
    import_quickly("harness.preflight.run")
    from harness.preflight.run import render, run_preflight

    try:
        result = run_preflight(options.device, options.data, options.folder)
    except UserError:
        raise
    except Exception as error:
        if (reason := failure(error)) is None:
            raise
        print(f"error: preflight: {reason}", file=sys.stderr)
        return FAILED
    if not is_first_rank():
        return FINISHED  # rank 0 speaks for all; a second failure would end it before it can
    print(json.dumps(result.as_json(), indent=2) if options.json else render(result), flush=True)
    for problem in result.problems:
        print(f"error: preflight: {problem.node}: {problem.text}", file=sys.stderr)
    if options.bad_nodes is not None:
        options.bad_nodes.write_text("".join(f"{node}\n" for node in result.bad_nodes))
    return FAILED if result.problems else FINISHED
