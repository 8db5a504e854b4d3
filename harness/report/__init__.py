"""harness report: run folders -> one HTML file, with the answer at the top."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from harness.errors import UserError
from harness.output_file import check_output, write_output
from harness.report.figures import Section, sections
from harness.report.groups import Group, group_runs
from harness.report.page import render
from harness.report.runs import RecordedRun, find_run_folders, read_run
from harness.report.scaling import read_scaling, scaling_section
from harness.report.svg import csv_text, draw


def write_report(paths: Sequence[Path], to: Path, assets: Path | None = None) -> str:
    """Read RUN or STUDY folders and write the page `to`; return a message for the user.

    `paths` may include files of scaling results (.json). `assets` receives each figure as SVG and
    its data as CSV. Raises UserError.
    """
    files = [path for path in paths if path.suffix == ".json"]
    paths = [path for path in paths if path not in files]
    if not paths:
        raise UserError("scaling results alone make no report; give a RUN or STUDY too")
    _check(to, "--to")
    if assets is not None:
        _check(assets / "figure.svg", "--assets")
    scaling = [scaling_section(read_scaling(path)) for path in files]
    runs = read_runs(paths)
    groups = group_runs(runs)
    found = [*sections(groups), *scaling]
    page = render(_title(paths, groups), groups, found)
    _write(to, page, "--to")
    message = f"report {to} ({len(runs)} run{'s' if len(runs) > 1 else ''})"
    if assets is not None:
        message += f"\n{_write_assets(assets, found)} files in {assets}"
    return message


def read_runs(paths: Sequence[Path]) -> list[RecordedRun]:
    """Read the runs of `paths`, each once; unreadable runs are reported and skipped."""
    studies = [path for path in paths if len(find_run_folders(path)) > 1]
    runs: dict[Path, RecordedRun] = {}
    for path in paths:
        here: dict[Path, RecordedRun] = {}
        for folder, variant in find_run_folders(path):
            if variant and len(studies) > 1:
                variant = f"{path.resolve().name}/{variant}"
            if folder.resolve() in runs:
                continue
            try:
                here[folder.resolve()] = read_run(folder, variant)
            except UserError as error:
                print(f"warning: run skipped: {error}", file=sys.stderr)
        runs |= sorted(here.items(), key=lambda item: item[1].config.recipe.minibatch)
    if not runs:
        raise UserError(f"{', '.join(map(str, paths))}: no readable run")
    return [*runs.values()]


def _title(paths: Sequence[Path], groups: Sequence[Group]) -> str:
    """Return the folder's name, preceded by its parent's where the name is only a seed number."""
    if len(paths) == 1:
        path = paths[0].resolve()
        return "/".join(path.parts[-2:]) if path.name.isdigit() else path.name
    if len(groups) == 1:
        return groups[0].label
    return f"{groups[0].config.model.name}, {len(groups)} configs"


def _write_assets(folder: Path, found: Sequence[Section]) -> int:
    figures = [figure for section in found for figure in section.figures]
    for figure in figures:
        _write(folder / f"{figure.name}.svg", draw(figure, standalone=True), "--assets")
        _write(folder / f"{figure.name}.csv", csv_text(figure), "--assets")
    return 2 * len(figures)


def _check(path: Path, option: str) -> None:
    """Raise UserError if the file, or the first missing folder above it, cannot be created."""
    while not path.parent.exists():
        path = path.parent
    check_output(path, option)


def _write(path: Path, text: str, option: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from None
    write_output(path, option, text)
