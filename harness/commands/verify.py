"""`harness verify`: prove that the number of ranks does not change the curve."""

from __future__ import annotations

import argparse
import json
import signal

from harness.commands.parsing import Subparsers, add_config
from harness.errors import FAILED, FINISHED, UserError


def add(commands: Subparsers) -> None:
    """Add the command to the parser."""
    verify = commands.add_parser("verify", help="prove that the number of ranks changes nothing")
    add_config(verify)
    verify.add_argument("--ranks", default="1,2,4", metavar="W,…", help="numbers of ranks (1,2,4)")
    verify.add_argument("--steps", type=int, default=50, metavar="S", help="steps to compare (50)")
    verify.add_argument("--json", action="store_true", help="print the comparisons as JSON")
    verify.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from harness.config.loading import load_config

    try:
        ranks = [int(world_size) for world_size in options.ranks.split(",") if world_size.strip()]
    except ValueError:
        raise UserError(f"--ranks {options.ranks}: give whole numbers, such as 1,2,4") from None
    config = load_config(options.config, options.overrides)  # reports mistakes before torch loads
    from harness.verify import verify
    from harness.verify.table import as_mapping, print_lines

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the ranks, removes files
    lines = verify(config, ranks, options.steps)
    if not options.json:
        return FINISHED if print_lines(config, ranks, options.steps, lines) else FAILED
    found = as_mapping(config, ranks, options.steps, lines)
    print(json.dumps(found, indent=2))
    return FINISHED if found["passed"] else FAILED
