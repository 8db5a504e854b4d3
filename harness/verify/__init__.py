"""`harness verify`: shows on this machine, with the user's model, data and loader, that a config
gives one curve on any number of ranks, with any micro-batch, and through an interruption.

Ranks are real processes (rank.py, started by launch.py). Each number of them is compared with one
rank (compare.py), in the order of cause and effect: the first line that fails is where to look.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.config import Config
from harness.verify.compare import Line, compare, compare_alone, compare_curves, run_ended
from harness.verify.launch import RANK_PROGRAM, Crashed, launch
from harness.verify.setting import Setting, check_setting, plural


def verify(
    config: Config, ranks: Sequence[int], steps: int, rank_program: Sequence[str] = RANK_PROGRAM
) -> Iterator[Line]:
    """Yields each comparison as soon as it is made. `rank_program` is the command of a rank.

    Raises UserError for what cannot be verified, before any rank is started.
    """
    with tempfile.TemporaryDirectory(prefix="harness-verify-") as folder:
        setting = check_setting(config, ranks, steps, Path(folder), rank_program)
        print(setting.work(), file=sys.stderr, flush=True)
        own = ["own_steps"] if setting.own_precision else []
        references = ["states", *own, "float64_steps"] if own else []
        try:
            one = launch(setting, "1 rank", 1, ["known_sum", "curve", *references])
        except Crashed as crash:
            yield run_ended("1 rank", crash)
            return
        yield from compare_alone(setting, "1 rank", one)
        tasks = ["known_sum", "curve", *own]
        images = setting.other_micro_batch
        yield from _compared(setting, f"1 rank, micro-batches of {images}", one, 1, tasks, images)
        for world_size in setting.ranks[1:]:
            where = plural(world_size) + setting.sharing(world_size)
            yield from _compared(setting, where, one, world_size, tasks, None)
        if setting.stop_at is not None:
            yield from _interrupted(setting, one)


def _compared(
    setting: Setting,
    where: str,
    one: dict[str, Any],
    world_size: int,
    tasks: list[str],
    micro_batch: int | None,
) -> Iterator[Line]:
    try:
        found = launch(setting, where, world_size, tasks, micro_batch)
    except Crashed as crash:
        yield run_ended(where, crash)
    else:
        yield from compare(setting, where, one, found)


def _interrupted(setting: Setting, one: dict[str, Any]) -> Iterator[Line]:
    """Stopped on the most ranks, resumed on the next fewer, against straight on one."""
    before, after = setting.ranks[-1], setting.ranks[-2]
    where = f"stopped in mid-epoch on {plural(before)}, resumed on {after}"
    try:
        launch(setting, f"{where}: stopping", before, ["stop"])
        found = launch(setting, f"{where}: resuming", after, ["resume"])
    except Crashed as crash:
        yield run_ended(where, crash)
    else:
        yield from compare_curves(setting, where, one, found)
