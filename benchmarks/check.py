"""Compare new figures with the committed ones, by ratio and never by absolute time.

    python -m benchmarks.check [FOLDER]

FOLDER is what `python -m benchmarks` has written (build/benchmarks). A figure is worse if its
median is beyond the committed quartiles and the committed median beyond its own, on the worse side,
so figures that vary more have to change by more; and by at least 5 %, since few repetitions of the
same code have differed by that much. The exit code is 1 if a figure is worse, 2 if nothing could be
compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.conditions import RESULTS

NEW = Path("build/benchmarks")
LABELS = ("case", "loop", "contender", "start")  # keys that name a row
# prefixes of the names of ratios, and whether higher is better
HIGHER = ("ratio",)
LOWER = ("cost_ratio", "with_to_without", "percent_of_step")
LEAST = 0.05  # share of the committed median
CONDITIONS = ("cpu", "cores", "gpu", "threads", "torch")


def figures(content: Any, label: str = "") -> Iterator[tuple[str, bool, dict[str, float]]]:
    """Yield every ratio in a result: its label, whether higher is better, its spread."""
    if isinstance(content, list):
        for row in content:
            yield from figures(row, label)
    elif isinstance(content, dict):
        names = [str(content[key]) for key in LABELS if key in content]
        label = ", ".join(filter(None, [label, *names]))
        for key, value in content.items():
            if isinstance(value, dict) and "median" in value and key.startswith(HIGHER + LOWER):
                yield f"{label}: {key}", key.startswith(HIGHER), value
            else:
                yield from figures(value, label)


def is_worse(new: dict[str, float], old: dict[str, float], higher_is_better: bool) -> bool:
    """Return True if the new median is worse by 5 %, and each is beyond the other's quartiles."""
    if abs(new["median"] - old["median"]) < LEAST * old["median"]:
        return False
    if higher_is_better:
        return new["median"] < old["quartile_1"] and new["quartile_3"] < old["median"]
    return new["median"] > old["quartile_3"] and new["quartile_1"] > old["median"]


def compare(new: dict[str, Any], old: dict[str, Any]) -> tuple[list[str], int]:
    """Return a line for each figure of the two results, and the number of worse ones."""
    lines, worse = [], 0
    for key in CONDITIONS:
        if new.get(key) != old.get(key):
            lines.append(f"  note: {key} was {old.get(key)}, is {new.get(key)}")
    committed = {label: (higher, value) for label, higher, value in figures(old)}
    for label, _, value in figures(new):
        if label not in committed:
            lines.append(f"  new    {_text(value)}   {'':27} {label}")
            continue
        higher, before = committed.pop(label)
        bad = is_worse(value, before, higher)
        worse += bad
        lines.append(f"  {'WORSE' if bad else 'ok':6} {_text(value)} was {_text(before)} {label}")
    lines += [f"  not measured now: {label}" for label in committed]
    return lines, worse


def _text(value: dict[str, float]) -> str:
    low, median, high = (value[key] for key in ("quartile_1", "median", "quartile_3"))
    return f"{median:7.3f} ({low:.3f}, {high:.3f})".ljust(26)


def main() -> None:
    """Print a line for each figure; the exit code shows whether one is worse."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=NEW)
    folder = parser.parse_args().folder
    found = [path for path in sorted(folder.glob("*.json")) if (RESULTS / path.name).exists()]
    if not found:
        print(f"error: {folder}: no results to compare; run python -m benchmarks first")
        sys.exit(2)
    worse = 0
    for path in found:
        old = json.loads((RESULTS / path.name).read_text())
        lines, count = compare(json.loads(path.read_text()), old)
        print("\n".join([f"{path.stem}, committed at {old['commit']}", *lines]))
        worse += count
    print(f"{worse} figures are worse" if worse else "no figure is worse")
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    main()
