"""The learning rate over the epochs, drawn in a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

COLUMNS, ROWS = 60, 10  # in characters


def draw_lr(plan: dict[str, Any]) -> list[str]:
    """A picture of the lr over the epochs, COLUMNS × ROWS braille characters and labelled axes.

    Step decay is drawn on a log scale: each ×0.1 is a stair of the same height.
    """
    curve, corners = plan["lr_curve"], [lr for _, _, lr, _ in plan["lr_corners"]]
    log = plan["lr_scale"] == "log"
    height: Callable[[float], float] = math.log if log else float
    # a corner may lie between two dots of the curve
    low, high = height(min(curve + corners) if log else 0.0), height(max(curve + corners))

    def dot_row(lr: float) -> int:  # 0 is the top
        return round((high - height(lr)) / ((high - low) or 1.0) * (4 * ROWS - 1))

    labels = {} if log else {ROWS - 1: "0"}
    for lr in sorted(corners, key=lambda lr: -abs(height(lr) - (high + low) / 2)):  # ends first
        labels.setdefault(dot_row(lr) // 4, f"{lr:.4g}")
    width = max(map(len, labels.values()))
    lines = [f"{'lr':>{width}}" + (" (log scale)" if log else "")]
    for row, text in enumerate(_braille([dot_row(lr) for lr in curve])):
        axis = "┤" if row in labels else "│"
        lines.append(f"{labels.get(row, ''):>{width}} {axis}{text}".rstrip())
    return lines + [" " * (width + 1) + line for line in _epoch_axis(plan)]


def _braille(dots: list[int]) -> list[str]:
    """Heights of 2·COLUMNS dots, 0 at the top, 4 a character -> ROWS lines, jumps joined."""
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # Unicode's order of dots
    cells = [[0] * COLUMNS for _ in range(ROWS)]
    for x, (before, here) in enumerate(pairwise([dots[0], *dots])):
        for y in range(min(before, here), max(before, here) + 1):
            cells[y // 4][x // 2] |= bits[y % 4][x % 2]
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in row) for row in cells]


def _epoch_axis(plan: dict[str, Any]) -> list[str]:
    """The axis with a tick at each corner, and its labels: the epochs."""
    last = plan["total_steps"] - 1
    ticks, labels = ["─"] * COLUMNS, " " * (COLUMNS + 10)
    free_from = 0
    for step, epoch, _, _ in plan["lr_corners"]:
        column = -(-step * (2 * COLUMNS - 1) // max(last, 1)) // 2  # where that step is first drawn
        ticks[column] = "┬"
        text = f"{plan['epochs'] if step == last else epoch:g}"
        if column + 1 >= free_from:
            labels = labels[: column + 1] + text + labels[column + 1 + len(text) :]
            free_from = column + len(text) + 2
    return ["└" + "".join(ticks), labels.rstrip() + "  epoch"]
