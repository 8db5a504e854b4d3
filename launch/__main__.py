"""The command line: python -m launch submit | study | preflight | status | logs | list | cancel."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from harness.commands.parsing import parse
from harness.errors import FINISHED, USER_ERROR, UserError
from launch.records import Record

if TYPE_CHECKING:  # PyTorch is imported by the commands that need it
    from launch.cluster_file import Cluster
    from launch.run_spec import RunSpec


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    options = parse(_parser(), arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names need not be UTF-8
        sys.stdout.reconfigure(errors="replace")
    try:
        return options.command(options)
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        what = "interrupted; what was submitted continues (squeue --me shows it, scancel ends it)"
        submits = options.cluster and options.command is not _preflight
        print(what if submits else "interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch", description="Runs, by SLURM or here.")
    commands = parser.add_subparsers(
        required=True, metavar="submit|study|preflight|status|logs|list|cancel"
    )
    submit = commands.add_parser("submit", help="one run, or a teacher and its student")
    submit.add_argument("config", metavar="CONFIG")
    _add_cluster(submit, required=True)
    submit.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: FOLDER/…)")
    submit.set_defaults(command=_submit)

    study = commands.add_parser("study", help="variants and seeds of a config")
    study.add_argument("study", metavar="FILE")
    _add_cluster(study, required=False)
    study.add_argument("--at-once", type=int, metavar="N", help="so many runs at a time")
    study.add_argument("--out", type=Path, metavar="DIR", help="folder (default: runs/studies/…)")
    study.set_defaults(command=_study)

    status = commands.add_parser("status", help="the state of what was started, in a table")
    status.add_argument("target", type=Path, metavar="RUN|STUDY")
    status.set_defaults(command=_status, cluster=None)

    preflight = commands.add_parser("preflight", help="name the nodes that are slow or different")
    preflight.add_argument("--cluster", required=True, metavar="FILE", help="the cluster file")
    preflight.add_argument("--nodes", metavar="N", help="instead of the file's")
    preflight.add_argument("--json", action="store_true", help="print the figures as JSON")
    preflight.set_defaults(command=_preflight)

    logs = commands.add_parser("logs", help="the log of what was started")
    logs.add_argument("target", type=Path, metavar="RUN|STUDY")
    logs.add_argument("-f", "--follow", action="store_true", help="as it grows, to the end")
    logs.set_defaults(command=_logs, cluster=None)

    listing = commands.add_parser("list", help="the state of all that was started below a folder")
    listing.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER")
    listing.set_defaults(command=_list, cluster=None)

    cancel = commands.add_parser("cancel", help="stop what waits or runs; it can be resumed")
    cancel.add_argument("target", type=Path, metavar="RUN|STUDY")
    cancel.set_defaults(command=_cancel, cluster=None)
    return parser


def _add_cluster(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--cluster", required=required, metavar="FILE", help="the cluster file")
    parser.add_argument("--nodes", metavar="N|MIN-MAX", help="instead of the file's")
    parser.add_argument("--wait", action="store_true", help="follow it to the end")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the sbatch script, the plan on stderr"
    )


def _submit(options: argparse.Namespace) -> int:
    from launch.cluster_file import check_environment, load_cluster, with_cluster
    from launch.run_spec import teachers_of, with_teachers
    from launch.status import active_record, follow

    cluster = load_cluster(options.cluster, options.nodes)
    check_environment(cluster, options.cluster)
    root = Path(cluster.folder).absolute()
    load = partial(with_cluster, cluster)
    run = with_teachers(options.config, options.overrides, root, load)
    if options.out is not None:
        run = replace(run, name=options.out.name, run=options.out)
    chain = [*teachers_of([run]), run]
    _show_whole_plans(chain, cluster, to=_beside(options))
    if not run.is_finished() and (has := active_record(run.run, run.name, cluster.backend)):
        raise UserError(f"{run.run}: job {has.job_id} has it already: {_status_of(run.run)}")
    records, _ = _submit_each(cluster, chain, options.dry_run)
    return follow(records) if options.wait and records else FINISHED


def _submit_each(
    cluster: Cluster, runs: Sequence[RunSpec], dry_run: bool
) -> tuple[list[Record], dict[Path, Record]]:
    """Submit a job for each run, after its teacher's, unless it is finished or has a job.

    Return the records of the new jobs, and those of all runs that have not finished.
    """
    from launch.backend import Request
    from launch.registry import find_backend
    from launch.status import active_record

    backend = find_backend(cluster.backend)
    records: list[Record] = []
    jobs: dict[Path, Record] = {}
    for run in runs:
        after = [jobs[run.teacher.run]] if run.teacher and run.teacher.run in jobs else []
        request = Request(cluster, run.run, [run], after)
        if run.is_finished():
            print(f"finished already: {run.run}")
        elif record := active_record(run.run, run.name, cluster.backend):
            jobs[run.run] = record
        elif dry_run:
            print(backend.preview(request))
            jobs[run.run] = Record(run.name, str(run.run), "", "", f"JOB_OF_{run.name}", 0)
        else:
            records += backend.submit(request).records
            jobs[run.run] = records[-1]
            print(_describe(records[-1]), flush=True)
    return records, jobs


def _study(options: argparse.Namespace) -> int:
    if options.at_once is not None and options.at_once < 1:
        raise UserError(f"--at-once {options.at_once}: at least 1 is needed")
    return _study_here(options) if options.cluster is None else _study_on_cluster(options)


def _study_here(options: argparse.Namespace) -> int:
    from launch.backend import Request
    from launch.records import LOCAL
    from launch.registry import find_backend
    from launch.run_spec import teachers_of
    from launch.study import study_folder, study_runs

    for flag in ("nodes", "wait"):
        if getattr(options, flag):
            raise UserError(f"--{flag} has no meaning without --cluster; remove it")
    folder = options.out or study_folder(options.study)
    runs = study_runs(options.study, folder, options.overrides)
    teachers = teachers_of(run for run in runs if not run.is_finished())
    teachers = [replace(t, name=_teachers_name(t, Path("runs"))) for t in teachers]
    _show_plans(teachers, runs, ranks=1)
    runs = [*teachers, *runs]
    waiting = sum(not run.is_finished() for run in runs)
    print(f"{waiting} of {len(runs)} runs to do, in {folder}")
    if options.dry_run or not waiting:
        return FINISHED
    print(f"states: {_status_of(folder)}", flush=True)
    request = Request(None, folder, runs, at_once=options.at_once)
    submission = find_backend(LOCAL).submit(request)
    return FINISHED if submission.exit_code is None else submission.exit_code


def _study_on_cluster(options: argparse.Namespace) -> int:
    from launch.backend import Request
    from launch.cluster_file import check_environment, load_cluster
    from launch.registry import find_backend
    from launch.run_spec import teachers_of
    from launch.status import active_record, follow
    from launch.study import study_folder, study_runs

    cluster = load_cluster(options.cluster, options.nodes)
    check_environment(cluster, options.cluster)
    backend = find_backend(cluster.backend)
    folder = options.out or study_folder(options.study, cluster.folder)
    runs = study_runs(options.study, folder, options.overrides, cluster)
    root = Path(cluster.folder).absolute()
    teachers = [replace(t, name=_teachers_name(t, root)) for t in teachers_of(runs)]
    _show_plans(teachers, runs, cluster.ranks, to=_beside(options))
    runs = [
        run
        for run in runs
        if not run.is_finished() and active_record(folder, run.name, cluster.backend) is None
    ]
    if not runs:
        print(f"nothing to submit: every run is finished or has a job; {_status_of(folder)}")
        return FINISHED
    _, jobs = _submit_each(cluster, teachers_of(runs), options.dry_run)
    request = Request(cluster, folder, runs, [*jobs.values()], options.at_once)
    if options.dry_run:
        print(backend.preview(request))
        return FINISHED
    records = backend.submit(request).records
    job = records[0].job_id.split("_")[0]
    print(f"job {job}: {len(records)} runs, in {folder}\nlogs in {Path(records[0].log).parent}")
    print(f"states: {_status_of(folder)}", flush=True)
    return follow(records) if options.wait else FINISHED


def _status(options: argparse.Namespace) -> int:
    from launch.status import table

    print(table(options.target))
    return FINISHED


def _preflight(options: argparse.Namespace) -> int:
    from launch.cluster_file import check_environment, load_cluster
    from launch.slurm.preflight import run_preflight

    cluster = load_cluster(options.cluster, options.nodes)
    if cluster.backend != "slurm":
        raise UserError(f"{options.cluster}: backend: a preflight takes place on SLURM only")
    check_environment(cluster, options.cluster)
    return run_preflight(cluster, options.json)


def _logs(options: argparse.Namespace) -> int:
    from launch.status import all_records, follow, print_logs

    if options.follow:
        return follow(all_records(options.target))
    print_logs(options.target)
    return FINISHED


def _list(options: argparse.Namespace) -> int:
    from launch.status import table_below

    print(table_below(options.folder))
    return FINISHED


def _cancel(options: argparse.Namespace) -> int:
    from launch.registry import find_backend
    from launch.status import active_records

    records = active_records(options.target)
    for record in records:
        find_backend(record.backend).cancel(record)
        print(f"{record.name}: job {record.job_id} is asked to stop", flush=True)
    if not records:
        print(f"{options.target}: nothing is waiting or running")
    return FINISHED


def _beside(options: argparse.Namespace) -> TextIO:
    """Return where plans go: the output of a dry run is the script."""
    return sys.stderr if options.dry_run else sys.stdout


def _show_whole_plans(runs: Sequence[RunSpec], cluster: Cluster, to: TextIO) -> None:
    """Print the plan of each run, so that a wrong config never reaches the queue."""
    from harness.planning.plan import make_plan
    from harness.planning.plan_text import render_plan
    from harness.planning.runtime import Hardware

    hardware = Hardware(cluster.gpus_per_node)
    plans = [
        make_plan(run.config, cluster.ranks, hardware=hardware, resuming=run.has_checkpoint())
        for run in runs
    ]
    for plan in plans:
        print(render_plan(plan), end="\n\n", file=to)


def _show_plans(
    teachers: Sequence[RunSpec], runs: Sequence[RunSpec], ranks: int, to: TextIO | None = None
) -> None:
    """Print a line for each teacher and variant; a wrong one is refused before anything starts."""
    from harness.planning.plan import make_plan

    one_of_each = {run.name: run for run in teachers}
    one_of_each |= {run.run.parent.name: run for run in runs}  # seeds change no plan
    plans = {
        name: make_plan(run.config, ranks, resuming=run.has_checkpoint())
        for name, run in one_of_each.items()
    }
    for name, plan in plans.items():
        peak_lr = plan["peak_lr_arithmetic"]
        print(f"{name}: {plan['total_steps']:,} steps, peak lr {peak_lr}", file=to)


def _teachers_name(teacher: RunSpec, root: Path) -> str:
    """Return a teacher's name within a study."""
    return "-".join(("teacher", *teacher.run.relative_to(root).parts))


def _describe(record: Record) -> str:
    waits = f", after job {record.after}" if record.after else ""
    return (
        f"job {record.job_id}{waits}\nrun folder {record.run}\nlog {record.log}\n"
        f"raw logs {Path(record.log).parent}\ncode {record.code or 'of the checkout'}\n"
        f"state: {_status_of(Path(record.run))}"
    )


def _status_of(target: Path) -> str:
    return f"python -m launch status {os.path.relpath(target)}"


if __name__ == "__main__":
    sys.exit(main())
