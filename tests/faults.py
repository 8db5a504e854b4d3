"""Starts runs that a test then harms: programs around `harness train`, real ranks, torchrun."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from harness.runs.checkpoint import list_checkpoints, load_checkpoint
from tests.conftest import rank_environment
from tests.limits import Limit

# what a test plants comes before it: `train` is the command that the rank then runs
PROGRAM = """
import os, sys, time
from harness.startup import import_quickly
import_quickly("harness.training.setup")
rank = int(os.environ.get("RANK", 0))
{plant}
from harness.commands.command_line import main
sys.exit(main(sys.argv[1:]))
"""
SLOW_STEP = """
from harness.training.step import Step
def slow(usual=Step.__call__):
    def call(self, step, batches):
        if step == {step} and rank == {rank}:
            print("reached step {step}", flush=True)
            time.sleep({seconds})
        usual(self, step, batches)
    Step.__call__ = call
slow()
"""


def start(
    arguments: list[object],
    rank: int = 0,
    world_size: int = 1,
    port: int = 0,
    plant: str = "",
    **environment: str,
) -> subprocess.Popen[str]:
    """Starts one rank of `harness` with what is planted; output and errors come in one stream."""
    base = rank_environment(rank, world_size, port) if world_size > 1 else None
    if base is None:
        base = {k: v for k, v in rank_environment(0, 1, 0).items() if "RANK" not in k}
        base = {k: v for k, v in base.items() if "WORLD_SIZE" not in k}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(plant=plant), *map(str, arguments)],
        env=base | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Reads a process' output up to the line that holds `text`; fails where it ends before."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} did not come:\n{seen}")


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Polls until `condition` holds."""
    limit = Limit(seconds)
    while not condition():
        assert not limit.is_over(), f"{what}: not within {seconds} s of a machine that is not busy"
        time.sleep(0.02)


def children_of(process: int) -> set[int]:
    """Living processes started by `process`. From /proc, as minimal systems have no `ps`."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(after_name[1]) == process and after_name[0] != "Z":
            found.add(int(status.parent.name))
    return found


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    found = list_checkpoints(folder / "checkpoints")
    return load_checkpoint(found[0])["step"] if found else 0
