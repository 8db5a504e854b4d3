"""`harness verify`: a proof that a config gives one curve on any number of ranks.

It is made on this machine, with the user's model, data and loader, and covers other micro-batches
and an interruption.

Ranks are real processes (rank.py, started by launch.py). Each number of ranks is compared with one
rank (compare.py), in the order of cause and effect: the first failing line is where to look.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

from harness.config.schema import Config
from harness.verify.compare import Line, compare, compare_alone, compare_curves, run_ended
from harness.verify.compare_bits import compare_bits, compare_exactly
from harness.verify.launch import RANK_PROGRAM, Crashed, launch_ranks
from harness.verify.setting import Setting, check_setting, plural


def verify(
    config: Config, ranks: Sequence[int], steps: int, rank_program: Sequence[str] = RANK_PROGRAM
) -> Iterator[Line]:
    """Yield each comparison as soon as it is made. `rank_program` is the command of a rank.

    Raises UserError before any rank starts if the config cannot be verified.
    """
    with tempfile.TemporaryDirectory(prefix="harness-verify-") as folder:
        setting = check_setting(config, ranks, steps, Path(folder), rank_program)
        print(setting.work(), file=sys.stderr, flush=True)
        try:
            yield from _lines(setting)
        except Crashed as crash:  # without one rank there is nothing to compare with
            yield run_ended("1 rank", crash)


def _lines(setting: Setting) -> Iterator[Line]:
    yield from _exact_lines(setting) if setting.exact else _float_lines(setting)


def _exact_lines(setting: Setting) -> Iterator[Line]:
    """Compare trajectories in the run's own precision, whose bits must be equal."""
    tasks = ["known_sum", "curve"]
    one = launch_ranks(setting, "1 rank", 1, tasks)
    yield from compare_alone(setting, "1 rank", one)
    for world_size in setting.ranks[1:]:
        where = plural(world_size) + setting.sharing(world_size)
        try:
            found = launch_ranks(setting, where, world_size, tasks)
        except Crashed as crash:
            yield run_ended(where, crash)
        else:
            yield from compare_exactly(setting, where, one, found)
    if setting.stop_at is not None:
        yield from _interrupted(setting, partial(compare_bits, setting, one=one))


def _float_lines(setting: Setting) -> Iterator[Line]:
    own = ["own_steps"] if setting.own_precision else []
    tasks = ["known_sum", "curve", *own, "float64_steps"]
    one = launch_ranks(setting, "1 rank", 1, ["states", *tasks])
    yield from compare_alone(setting, "1 rank", one)
    # computed only if a trajectory differs by more than FLOAT64_BOUND
    twin = cache(partial(launch_ranks, setting, "1 rank, initial weights rounded", 1, ["twin"]))
    images = setting.other_micro_batch
    launches: list[tuple[str, int, int | None]] = [
        (f"1 rank, micro-batches of {images}", 1, images)
    ]
    for world_size in setting.ranks[1:]:
        launches.append((plural(world_size) + setting.sharing(world_size), world_size, None))
    for where, world_size, micro_batch in launches:
        try:
            found = launch_ranks(setting, where, world_size, tasks, micro_batch)
        except Crashed as crash:
            yield run_ended(where, crash)
        else:
            yield from compare(setting, where, one, found, twin)
    if setting.stop_at is not None:
        yield from _interrupted(setting, partial(compare_curves, setting, one=one, twin=twin))


def _interrupted(setting: Setting, compare: Callable[..., Iterator[Line]]) -> Iterator[Line]:
    """Compare a run stopped on most ranks and resumed on fewer with an uninterrupted one."""
    before, after = setting.ranks[-1], setting.ranks[-2]
    where = f"stopped in mid-epoch on {plural(before)}, resumed on {after}"
    try:
        launch_ranks(setting, f"{where}: stopping", before, ["stop"])
        found = launch_ranks(setting, f"{where}: resuming", after, ["resume"])
    except Crashed as crash:
        yield run_ended(where, crash)
    else:
        yield from compare(where=where, found=found)
