"""The table of comparisons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from harness.config.schema import Config
from harness.verify.compare import Line

WIDTHS = 44, 18, 12, 10


def print_lines(config: Config, ranks: Sequence[int], steps: int, lines: Iterable[Line]) -> bool:
    """Print the table line by line as the comparisons finish; return True if all passed."""
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
) -> dict[str, object]:
    """Return the comparisons as the JSON object of --json."""
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
    """Return the heading: what is compared, and the columns."""
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
    """Return one line, with details below it if it failed."""
    numbers = [line.difference, line.bound]
    texts = ["" if n is None else str(n) if line.bound == 0 else f"{n:.1e}" for n in numbers]
    what, over, difference, bound = WIDTHS
    text = (
        f"  {line.what:<{what}}{line.over:>{over}}{texts[0]:>{difference}}{texts[1]:>{bound}}"
        f"  {'pass' if line.passed else 'FAIL'}"
    )
    return f"{text}\n      {line.detail}" if line.detail else text


def render_verdict(lines: Sequence[Line]) -> str:
    """Return the last line: all passed, or what failed first."""
    failed = [line for line in lines if not line.passed]
    if not failed:
        return f"pass: all {len(lines)} lines"
    first = failed[0]
    text = f"FAIL: {len(failed)} of {len(lines)} lines; first: {first.what}, {first.where}"
    text += f": {first.detail}" if first.detail else ""
    return text + ("; later failures may be its consequences" if len(failed) > 1 else "")
