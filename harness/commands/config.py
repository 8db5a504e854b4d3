"""`harness config`: the reference of the config's keys."""

from __future__ import annotations

import argparse

from harness.commands.parsing import Subparsers
from harness.errors import FINISHED


def add(commands: Subparsers) -> None:
    """Add the command to the parser."""
    config = commands.add_parser("config", help="explain the keys of a config")
    what = config.add_mutually_exclusive_group()
    what.add_argument("key", nargs="?", default="", metavar="SECTION|KEY", help="default: all keys")
    what.add_argument("--markdown", action="store_true", help="print docs/config.md")
    what.add_argument("--json-schema", action="store_true", help="print configs/schema.json")
    config.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from harness.config.reference import json_schema, render_markdown, render_reference

    if options.json_schema:
        print(json_schema(), end="")
    elif options.markdown:
        print(render_markdown(), end="")
    else:
        print(render_reference(options.key))
    return FINISHED
