"""Plots of students.py's curves: validation error against steps, with the teacher's error.

python -m benchmarks.students_plot benchmarks/results/students_digits.json --to FILE.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def draw(found: dict[str, Any], path: Path) -> Path:
    """Draw an SVG with a line per student (mean over seeds) from the results of students.py."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "students"  # equal figures give equal files
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for name, student in found["students"].items():
        steps, errors = zip(*student["mean_curve"], strict=True)
        axis.plot(steps, errors, label=name)
    axis.axhline(found["teacher_error"], color="grey", linestyle="--", label="teacher")
    axis.set_xlabel("steps")
    axis.set_ylabel("validation error, %")
    axis.set_ylim(bottom=0)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    print(draw(json.loads(options.results.read_text()), options.to))


if __name__ == "__main__":
    main()
