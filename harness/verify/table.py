"""The comparisons as a table, for people who see it for the first time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from harness.config.schema import Config
from harness.verify.compare import Line

WIDTHS = 44, 18, 12, 10


def print_lines(config: Config, ranks: Sequence[int], steps: int, lines: Iterable[Line]) -> bool:
    """Prints the table line by line as they come; whether all passed."""
    printed: list[Line] = []
    for line in lines:
        if not printed:
            print(render_heading(config, ranks, steps))
        if not printed or printed[-1].where != line.where:
            print(line.where)
        print(render_line(line), flush=True)
        printed.append(line)
    print(render_verdict(printed))
    return all(line.passed for line in printed)


def as_mapping(
    config: Config, ranks: Sequence[int], steps: int, lines: Iterable[Line]
) -> dict[str, Any]:
    """The same for --json."""
    found = list(lines)
    return {
        "model": config.model.name,
        "minibatch": config.recipe.minibatch,
        "precision": config.run.precision,
        "ranks": sorted({1, *ranks}),
        "steps": steps,
        "passed": all(line.passed for line in found),
        "lines": [asdict(line) for line in found],
    }


def render_heading(config: Config, ranks: Sequence[int], steps: int) -> str:
    """What is compared with what, and the columns."""
    recipe = config.recipe
    others = ", ".join(str(world_size) for world_size in sorted({*ranks} - {1}))
    what, over, difference, bound = WIDTHS
    return (
        f"{config.model.name}, {config.workers} workers of {recipe.worker_batch} images: "
        f"{others} ranks against 1 over {steps} steps\n\n"
        f"{'compared with 1 rank':<{what + 2}}{'over':>{over}}{'difference':>{difference}}"
        f"{'bound':>{bound}}"
    )


def render_line(line: Line) -> str:
    """One line; what differs stands below it."""
    numbers = [line.difference, line.bound]
    texts = ["" if n is None else str(n) if line.bound == 0 else f"{n:.1e}" for n in numbers]
    what, over, difference, bound = WIDTHS
    text = (
        f"  {line.what:<{what}}{line.over:>{over}}{texts[0]:>{difference}}{texts[1]:>{bound}}"
        f"  {'pass' if line.passed else 'FAIL'}"
    )
    return f"{text}\n      {line.detail}" if line.detail else text


def render_verdict(lines: Sequence[Line]) -> str:
    """One line: whether all passed, or what failed first."""
    failed = [line for line in lines if not line.passed]
    if not failed:
        return f"pass: all {len(lines)} lines"
    first = failed[0]
    text = f"FAIL: {len(failed)} of {len(lines)} lines; first: {first.what}, {first.where}"
    text += f": {first.detail}" if first.detail else ""
    return text + ("; what fails after it may follow from it" if len(failed) > 1 else "")
