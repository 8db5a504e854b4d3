"""The errors of a study's runs, by variant: docs/reproduction.md has them from here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.conditions import write_results
from harness.recipe.schedule import peak_lr
from harness.report import read_runs
from harness.report.groups import Group, group_runs
from harness.report.runs import RecordedRun


def variants(study: Path) -> list[dict[str, Any]]:
    """By rising minibatch, each with its runs; errors in %, std over the finished ones (n - 1)."""
    return [_variant(group) for group in group_runs(read_runs([study]))]


def _variant(group: Group) -> dict[str, Any]:
    recipe = group.config.recipe
    return {
        "variant": group.label,
        "minibatch": recipe.minibatch,
        "steps": group.config.total_steps,
        "peak_lr": peak_lr(recipe),
        "warmup": recipe.warmup,
        "last_gamma": group.config.model.last_gamma,
        "mean_error": group.mean,
        "std_error": group.std,
        "runs": [_run(run) for run in group.runs],
    }


def _run(run: RecordedRun) -> dict[str, Any]:
    versions = run.environment.get("versions", {})
    return {
        "seed": run.config.seed,
        "state": run.state,
        "error": run.error,
        "validation_errors": {epoch.epoch: epoch.error for epoch in run.evaluations},
        "steps": run.status.get("step", 0),
        "launches": len(run.launches),
        "wall_s": round(run.wall_s),
        "hardware": run.hardware,
        "torch": versions.get("torch"),
        "commit": run.environment.get("git_commit"),
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a variant."""
    lines = ["| variant | kn | peak lr | error, % | each seed |", "| --- | --- | --- | --- | --- |"]
    for one in found:
        errors = [run["error"] for run in one["runs"] if run["error"] is not None]
        spread = f" ± {one['std_error']:.2f}" if one["std_error"] is not None else ""
        mean = f"{one['mean_error']:.2f}{spread}" if errors else "–"
        said = [
            run["state"] if run["error"] is None else f"{run['error']:.2f}" for run in one["runs"]
        ]
        figures = [str(one["minibatch"]), f"{one['peak_lr']:.4g}", mean, ", ".join(said)]
        lines.append(f"| {' | '.join([one['variant'], *figures])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduction")
    parser.add_argument("study", type=Path, metavar="STUDY", help="runs/studies/one_machine")
    parser.add_argument("--write", action="store_true", help="into results/reproduction.json")
    options = parser.parse_args()
    found = variants(options.study)
    print(table(found))
    if options.write:
        print(write_results("reproduction", {"study": options.study.name, "variants": found}))


if __name__ == "__main__":
    main()
