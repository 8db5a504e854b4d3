"""`harness train`: train, alone or as a rank of torchrun or srun."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

from harness.commands.messages import complain, failure, is_first_rank
from harness.commands.parsing import Subparsers, add_config
from harness.errors import FAILED, FINISHED, STOPPED, UserError
from harness.resilience.unfailing_output import unfailing_output
from harness.slurm_step import check_not_in_step_shell, unused_tasks
from harness.startup import import_quickly


def add(commands: Subparsers) -> None:
    """Add the command to the parser."""
    train = commands.add_parser("train", help="train, alone or as a rank of torchrun or srun")
    add_config(train)
    train.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/…)")
    train.add_argument("--resume", action="store_true", help="start, continue, or show the result")
    train.set_defaults(command=run)


@unfailing_output()
def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from harness.config.stages import load_stages

    check_not_in_step_shell()
    if hint := unused_tasks():
        print(f"note: {hint}", file=sys.stderr)
    stages = load_stages(options.config, options.overrides)  # report a mistake before torch loads
    from harness.config.schema import NO_EXPECTATION

    import_quickly("harness.training.setup")
    from harness.distributed import uses_cpu
    from harness.outcome import Stopped
    from harness.training.setup import train_stages
    from harness.training.tuning.malloc import keep_freed_memory

    if uses_cpu(stages[-1].config.run.device):
        keep_freed_memory()
    first = is_first_rank()
    command = resume_command(options)
    try:
        result = train_stages(stages, options.out, resume=options.resume, resume_command=command)
    except UserError:
        raise
    except Stopped as stopped:
        if first:
            print(f"{stopped}\nresume with: {command}", flush=True)
        # torchrun takes any other code than 0 for a failure and would start the ranks again
        return FINISHED if "TORCHELASTIC_RUN_ID" in os.environ else STOPPED
    except Exception as error:
        if reason := failure(error):
            # torchrun ends the other ranks as soon as one fails; this one still has a word to say
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            complain(reason)
        if first:
            print(f"resume from the last checkpoint with: {command}", file=sys.stderr)
        if reason is None:  # a bug: its traceback is wanted
            raise
        return FAILED
    if first:
        print(f"error {result.headline}")
        expect = result.config.expect
        print(f"expected {expect}" if expect else NO_EXPECTATION)
        weights = f", weights {result.weights_sha256[:12]}" if result.weights_sha256 else ""
        print(f"run folder {result.folder}{weights}", flush=True)
    return FINISHED


def resume_command(options: argparse.Namespace) -> str:
    """Return the command that resumes this run, as the user launched it."""
    words = ["harness"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // local_ranks
        words = ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else [])]
        words += ["--nproc-per-node", str(local_ranks), "-m", "harness"]
    words += ["train", options.config, *options.overrides]
    if options.out is not None:
        words += ["--out", str(options.out)]
    return shlex.join([*words, "--resume"])
