"""A plot of the learning rate over the epochs, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from harness.planning.plan import CURVE_POINTS, Plan

COLUMNS, ROWS = CURVE_POINTS // 2, 10  # characters; a braille character is two dots wide


def draw_lr(plan: Plan) -> list[str]:
    """Draw the lr over the epochs with COLUMNS × ROWS braille characters and labelled axes.

    Step decay has a log scale, on which each ×0.1 is a stair of the same height.
    """
    curve, corners = plan["lr_curve"], [corner.lr for corner in plan["lr_corners"]]
    log = plan["lr_scale"] == "log"
    height: Callable[[float], float] = math.log if log else float
    # A corner may lie between two points of the curve.
    low, high = height(min(curve + corners) if log else 0.0), height(max(curve + corners))

    def dot_row(lr: float) -> int:  # 0 is at the top
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
    """Draw 2·COLUMNS dots at these heights, 0 at the top, as ROWS lines, and join the jumps.

    A character holds 4 × 2 dots.
    """
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # in Unicode's order
    cells = [[0] * COLUMNS for _ in range(ROWS)]
    for x, (before, here) in enumerate(pairwise([dots[0], *dots])):
        for y in range(min(before, here), max(before, here) + 1):
            cells[y // 4][x // 2] |= bits[y % 4][x % 2]
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in row) for row in cells]


def _epoch_axis(plan: Plan) -> list[str]:
    """Draw the axis, with a tick at each corner, and the epochs as its labels."""
    last = plan["total_steps"] - 1
    ticks, labels = ["─"] * COLUMNS, " " * (COLUMNS + 10)
    free_from = 0
    for step, epoch, _, _ in plan["lr_corners"]:
        column = -(-step * (2 * COLUMNS - 1) // max(last, 1)) // 2  # the first one that shows it
        ticks[column] = "┬"
        text = f"{plan['epochs'] if step == last else epoch:g}"
        if column + 1 >= free_from:
            labels = labels[: column + 1] + text + labels[column + 1 + len(text) :]
            free_from = column + len(text) + 2
    return ["└" + "".join(ticks), labels.rstrip() + "  epoch"]
