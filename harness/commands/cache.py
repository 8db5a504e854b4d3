"""`harness cache`: write a teacher's logits for many students."""

from __future__ import annotations

import argparse

from harness.commands.messages import complain, failure, is_first_rank
from harness.commands.parsing import Subparsers, add_config
from harness.errors import FAILED, FINISHED, UserError
from harness.startup import import_quickly


def add(commands: Subparsers) -> None:
    """Add the command to the parser."""
    cache = commands.add_parser("cache", help="write a teacher's soft targets to distill.cache")
    add_config(cache)
    cache.add_argument("--epochs", type=int, required=True, metavar="E", help="of crops")
    cache.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    cache.add_argument("--top", type=int, metavar="K", help="the largest logits only")
    cache.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from harness.config.stages import load_stages

    *teachers, student = load_stages(options.config, options.overrides)
    config = student.config
    if config.distill is None or config.distill.cache is None:
        raise UserError(f"{options.config}: write the folder to fill in distill.cache")
    if options.epochs < 1:
        raise UserError(f"--epochs {options.epochs}: at least 1 is needed")
    if options.top is not None and not 1 <= options.top < config.data.classes:
        raise UserError(f"--top {options.top}: give 1 to {config.data.classes - 1}, or leave it")
    import_quickly("harness.training.setup")
    from harness.training.setup import cache_soft_targets

    try:
        folder = cache_soft_targets(config, teachers, options.epochs, options.dtype, options.top)
    except Exception as error:
        if reason := failure(error):
            complain(reason)
            return FAILED
        raise
    if is_first_rank():
        print(f"cache written: {folder}", flush=True)
    return FINISHED
