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
    """Reads RUN or STUDY folders and writes the page `to`; says what it wrote.

    Among `paths` may be a file of scaling results (.json). `assets` gets each figure as SVG and its
    data as CSV. Raises UserError.
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
    said = f"report {to} ({len(runs)} run{'s' if len(runs) > 1 else ''})"
    if assets is not None:
        said += f"\n{_write_assets(assets, found)} files in {assets}"
    return said


def read_runs(paths: Sequence[Path]) -> list[RecordedRun]:
    """All runs of `paths`, each once; one that cannot be read is told and left out."""
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
                print(f"warning: left out: {error}", file=sys.stderr)
        runs |= sorted(here.items(), key=lambda item: item[1].config.recipe.minibatch)
    if not runs:
        raise UserError(f"{', '.join(map(str, paths))}: holds no run that can be read")
    return [*runs.values()]


def _title(paths: Sequence[Path], groups: Sequence[Group]) -> str:
    """The folder's name; with the one above, where it is but a seed's number."""
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
    """Raise UserError where the file, or the first missing folder above it, cannot be made."""
    while not path.parent.exists():
        path = path.parent
    check_output(path, option)


def _write(path: Path, text: str, option: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from None
    write_output(path, option, text)
