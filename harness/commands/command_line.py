"""The command line: `harness COMMAND`.

Cheap to import: each command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence

from harness import __version__
from harness.commands import (
    cache,
    config,
    data,
    evaluate,
    export,
    init,
    plan,
    predict,
    preflight,
    report,
    train,
    verify,
)
from harness.commands.messages import complain
from harness.commands.parsing import Parser, parse
from harness.errors import FAILED, USER_ERROR, UserError, record_for_torchrun

COMMANDS = (
    *(data, init, config, plan, train, verify),
    *(cache, evaluate, predict, report, export, preflight),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    options = parse(_parser(), arguments)
    # PyTorch reports a lost peer as pages of C++ frames; print one line instead
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for stream in (sys.stdout, sys.stderr):  # terminals that lack γ or × show ? instead
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = options.command(options)
        sys.stdout.flush()  # finds a reader that has gone here rather than at the exit
        return code
    except UserError as error:
        complain(str(error))
        return USER_ERROR
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:  # a bug: Python prints its traceback
        record_for_torchrun(traceback.format_exception_only(error)[-1])
        raise


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="harness", description="One recipe, one curve.")
    parser.add_argument("--version", action="version", version=f"harness {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
