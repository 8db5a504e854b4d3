"""The errors of a study's runs, by variant: the source of docs/reproduction.md.

    python -m benchmarks.reproduction STUDY [--write] [--figures DIR]

STUDY is the folder of a study's runs, or results/reproduction.json, from whose validation errors
the errors and figures are recomputed by the harness's current rule.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.conditions import RESULTS, conditions
from harness.atomic_file import write_atomically
from harness.config.schema import ExpectConfig
from harness.recipe.schedule import peak_lr
from harness.report import read_runs
from harness.report.events import state_name
from harness.report.figures import sections
from harness.report.groups import Group, group_runs
from harness.report.runs import Evaluated, RecordedRun
from harness.report.svg import csv_text, draw
from launch.study import study_runs

BASELINE = "kn128"
WARMUPS = ("kn1024", "kn1024_no_warmup", "kn1024_constant_warmup")
FIGURES = (  # file, the report's figure, the variants in it
    (
        "error-against-minibatch",
        "error-against-minibatch",
        (BASELINE, "kn256", "kn512", "kn1024", "kn2048"),
    ),
    ("warmup-validation-error", "validation-error", WARMUPS),
)


def variants(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return variants by rising minibatch, with runs; errors in %, std (n - 1) of finished runs."""
    return [_variant(group) for group in groups]


def _variant(group: Group) -> dict[str, Any]:
    recipe = group.config.recipe
    return {
        "variant": group.label,
        "minibatch": recipe.minibatch,
        "steps": group.config.total_steps,
        "peak_lr": peak_lr(recipe),
        "warmup": recipe.warmup,
        "last_gamma": group.config.model.last_gamma,
        "error_is": group.rule,
        "mean_error": group.mean,
        "std_error": group.std,
        "runs": [_run(run) for run in group.runs],
    }


def _run(run: RecordedRun) -> dict[str, Any]:
    versions = run.environment.get("versions", {})
    return {
        "seed": run.config.seed,
        "state": state_name(run.state),
        "error": run.error,
        "validation_errors": {epoch.epoch: epoch.error for epoch in run.evaluations},
        "steps": run.status.get("step", 0),
        "launches": len(run.launches),
        "wall_s": round(run.wall_s),
        "hardware": run.hardware,
        "torch": versions.get("torch"),
        "commit": run.environment.get("git_commit"),
    }


def stored_groups(stored: dict[str, Any], study: Path) -> list[Group]:
    """Return the groups of stored `variants`; `study` is the study file of their configs."""
    configs = {run.name: run.config for run in study_runs(study, Path("runs"))}
    runs = []
    for variant in stored["variants"]:
        for run in variant["runs"]:
            config = configs[f"{variant['variant']}-{run['seed']}"]
            errors = run["validation_errors"].items()
            evaluated = [Evaluated(int(epoch), error, error, None) for epoch, error in errors]
            status = {"state": run["state"], "step": run["steps"], "error": run["error"]}
            folder = Path(variant["variant"]) / str(run["seed"])
            runs.append(
                RecordedRun(
                    folder, variant["variant"], config, {}, status, [], [], [], evaluated, [], 0
                )
            )
    return group_runs(runs)


def recomputed(stored: dict[str, Any], groups: Sequence[Group]) -> dict[str, Any]:
    """Return `stored` with each error recomputed from its validation errors."""
    rows = []
    for row, group in zip(stored["variants"], groups, strict=True):
        errors = [
            run | {"error": now.error} for run, now in zip(row["runs"], group.runs, strict=True)
        ]
        new = {"error_is": group.rule, "mean_error": group.mean, "std_error": group.std}
        rows.append({k: v for k, v in row.items() if k not in (*new, "runs")} | new)
        rows[-1]["runs"] = errors
    return stored | {"variants": rows}


def write_figures(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Write the figures of docs/reproduction.md, each with its data as CSV.

    The expected error in them is the baseline's, which linear scaling would preserve.
    """
    (baseline,) = (group for group in groups if group.label == BASELINE)
    assert baseline.mean is not None
    source, runs = f"measured at {BASELINE}", len(baseline.errors)
    expect = ExpectConfig(error=baseline.mean, std=baseline.std, runs=runs, source=source)
    written = []
    for file, name, labels in FIGURES:
        shown = [_expecting(group, expect) for group in groups if group.label in labels]
        figures = [figure for section in sections(shown) for figure in section.figures]
        (figure,) = (figure for figure in figures if figure.name == name)
        for suffix, text in ((".svg", draw(figure, standalone=True)), (".csv", csv_text(figure))):
            written.append(folder / f"{file}{suffix}")
            write_atomically(written[-1], text.encode())
    return written


def _expecting(group: Group, expect: ExpectConfig) -> Group:
    def expecting(run: RecordedRun) -> RecordedRun:
        return replace(run, config=run.config.model_copy(update={"expect": expect}))

    return replace(group, runs=tuple(map(expecting, group.runs)))


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table with one line per variant."""
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
    """Print the table; --write stores the errors in benchmarks/results/reproduction.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduction")
    parser.add_argument("study", type=Path, metavar="STUDY", help="runs/studies/one_machine")
    parser.add_argument("--write", action="store_true", help="into results/reproduction.json")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="docs/reproduction")
    options = parser.parse_args()
    if options.study.suffix == ".json":
        stored = json.loads(options.study.read_text())
        groups = stored_groups(stored, Path(f"configs/studies/{stored['study']}.yaml"))
        content = recomputed(stored, groups)
    else:
        groups = group_runs(read_runs([options.study]))
        content = conditions() | {"study": options.study.name, "variants": variants(groups)}
    print(table(content["variants"]))
    if options.write:
        path = RESULTS / "reproduction.json"
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
        print(path)
    if options.figures:
        print(*write_figures(groups, options.figures), sep="\n")


if __name__ == "__main__":
    main()
