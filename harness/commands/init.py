"""`harness init`: draft a config."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.parsing import Subparsers
from harness.errors import FINISHED, UserError
from harness.startup import import_quickly


def add(commands: Subparsers) -> None:
    """Add the command to the parser."""
    init = commands.add_parser("init", help="print a config for a folder of images")
    init.add_argument(
        "folder", nargs="?", type=Path, metavar="DATA_DIR", help="holds train/CLASS/, val/CLASS/"
    )
    init.add_argument("--model", metavar="NAME", help="default: resnet50; resnet20 below 64 pixels")
    init.add_argument(
        "--ranks", type=int, metavar="W", help="to run on; with --from, what the arguments ran on"
    )
    init.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="timm's args.yaml, or a file with the command line of torchvision's train.py",
    )
    init.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    if options.folder is None and options.source is None:
        raise UserError("give the folder of the images, or --from FILE")
    if options.ranks is not None and options.ranks < 1:
        raise UserError(f"--ranks {options.ranks}: at least 1 rank is needed")
    import_quickly("harness.drafts.translation")
    from harness.drafts.from_folder import draft_for
    from harness.drafts.translation import draft_from

    if options.source is None:
        print(draft_for(options.folder, options.model, options.ranks), end="")
    else:
        print(draft_from(options.source, options.folder, options.model, options.ranks), end="")
    return FINISHED
