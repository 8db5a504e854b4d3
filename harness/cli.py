"""The command line: harness data | plan | train | verify | eval | report | export.

Cheap to import."""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from harness.errors import (
    FAILED,
    FINISHED,
    STOPPED,
    USER_ERROR,
    RunFailed,
    UserError,
    record_for_torchrun,
)
from harness.resilience.unfailing_output import unfailing_output
from harness.startup import import_quickly

TORCHRUN_ENDS_OTHERS_S = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    options = _parse(arguments)
    # PyTorch tells of a lost peer in pages of C++ frames; what matters is told in a line of ours
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for stream in (sys.stdout, sys.stderr):  # a terminal without γ or × shows ? for them
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return options.command(options)
    except UserError as error:
        _complain(str(error))
        return USER_ERROR
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:  # a bug: Python prints its traceback
        record_for_torchrun(traceback.format_exception_only(error)[-1])
        raise


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes positionals in one piece only; here key=value may stand anywhere."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if "=" not in word or word.startswith("-")]
    if unknown or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        options.overrides += rest
    return options


def _complain(message: str) -> None:
    """One line on standard error. Local ranks fail alike: the first speaks, and the launcher
    ends the others before they would; one that fails alone is heard."""
    record_for_torchrun(message)
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    prefix = "error: "
    if local_rank > 0:
        time.sleep(TORCHRUN_ENDS_OTHERS_S)
        prefix = f"error: rank {os.environ.get('RANK', os.environ.get('SLURM_PROCID'))}: "
    print(prefix + " ".join(message.split()), file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors torchrun shows too."""

    def error(self, message: str) -> NoReturn:
        record_for_torchrun(message)
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    from harness import __version__

    parser = Parser(prog="harness", description="One recipe, one curve.")
    parser.add_argument("--version", action="version", version=f"harness {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_data(commands)

    _add_plan(commands)
    train = commands.add_parser("train", help="train, alone or as a rank of torchrun or srun")
    _add_config(train)
    train.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/…)")
    train.add_argument("--resume", action="store_true", help="start, go on, or show the result")
    train.set_defaults(command=_train)

    verify = commands.add_parser("verify", help="show that other numbers of ranks change nothing")
    _add_config(verify)
    verify.add_argument("--ranks", default="1,2,4", metavar="W,…", help="default: 1,2,4")
    verify.add_argument("--steps", type=int, default=50, metavar="S", help="default: 50")
    verify.add_argument("--json", action="store_true")
    verify.set_defaults(command=_verify)

    cache = commands.add_parser("cache", help="write a teacher's soft targets to distill.cache")
    _add_config(cache)
    cache.add_argument("--epochs", type=int, required=True, metavar="E", help="of crops")
    cache.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    cache.add_argument("--top", type=int, metavar="K", help="the largest logits only")
    cache.set_defaults(command=_cache)

    evaluate = commands.add_parser("eval", help="evaluate a run or a checkpoint")
    evaluate.add_argument("run", type=Path, metavar="RUN|CHECKPOINT")
    evaluate.add_argument("overrides", nargs="*", metavar="run.key=value")
    evaluate.add_argument("--json", action="store_true")
    evaluate.add_argument("--predictions", type=Path, metavar="FILE.csv")
    evaluate.set_defaults(command=_eval)

    report = commands.add_parser("report", help="one HTML file of runs and studies")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN|STUDY|SCALING.json")
    report.add_argument("--to", type=Path, required=True, metavar="FILE.html")
    report.add_argument(
        "--assets", type=Path, metavar="DIR", help="each figure as SVG, its data as CSV"
    )
    report.set_defaults(command=_report)

    export = commands.add_parser("export", help="a plain torchvision state dict of a run")
    export.add_argument("run", type=Path, metavar="RUN|CHECKPOINT")
    export.add_argument(
        "--to", type=Path, required=True, metavar="FILE", help=".pt or .safetensors"
    )
    export.set_defaults(command=_export)
    return parser


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser("plan", help="what would be run, without data or GPU")
    _add_config(plan)
    plan.add_argument("--ranks", type=int, default=1, metavar="W", help="world size (default 1)")
    plan.add_argument("--json", action="store_true")
    plan.add_argument("--lr-at", default="", metavar="STEP,…", help="learning rate at these steps")
    assumed = plan.add_argument_group("what the predicted times assume (docs/scaling.md)")
    assumed.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="default 8")
    assumed.add_argument(
        "--images-per-second", type=float, metavar="X", help="of one GPU alone, as measured"
    )
    assumed.add_argument(
        "--gbit-per-second", type=float, default=400, metavar="B", help="a GPU; default 400"
    )
    plan.set_defaults(command=_plan)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as recipe.epochs=30"
    )


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="make and check folders of images")
    kinds = data.add_subparsers(
        required=True, metavar="digits|cifar10|imagenet|import|check", dest="kind"
    )
    digits = kinds.add_parser("digits", help="scikit-learn's 1,797 handwritten digits")
    digits.add_argument(
        "--labelled", type=float, default=1.0, metavar="SHARE", help="rest: unlabelled/"
    )
    cifar10 = kinds.add_parser("cifar10", help="downloaded by torchvision, or from an archive")
    cifar10.add_argument("--archive", type=Path, metavar="FILE")
    imagenet = kinds.add_parser("imagenet", help="from the official archives")
    imagenet.add_argument("--archives", type=Path, required=True, metavar="DIR")
    imported = kinds.add_parser("import", help="from another layout (tiny-imagenet, Kaggle, …)")
    imported.add_argument("source", type=Path, metavar="SOURCE")
    imported.add_argument("--val", type=float, metavar="SHARE", help="hold out, if it has no val")
    check = kinds.add_parser("check", help="find what training refuses, leaves out or trips over")
    check.add_argument("--json", action="store_true", help="lists all, not the first 20 of a kind")
    for kind in (digits, cifar10, imagenet, imported, check):
        kind.add_argument("folder", type=Path, metavar="DIR")
    data.set_defaults(command=_data)


def _data(options: argparse.Namespace) -> int:
    if options.kind == "check":
        return _check(options)
    if options.kind == "import":
        from harness.data.prepare.import_layout import import_layout

        print(import_layout(options.source, options.folder, options.val))
        return FINISHED
    from harness.data.prepare.cifar10 import prepare_cifar10
    from harness.data.prepare.digits import prepare_digits
    from harness.data.prepare.imagenet import prepare_imagenet

    if options.kind == "digits":
        print(prepare_digits(options.folder, options.labelled))
    elif options.kind == "cifar10":
        print(prepare_cifar10(options.folder, options.archive))
    else:
        print(prepare_imagenet(options.folder, options.archives))
    return FINISHED


def _check(options: argparse.Namespace) -> int:
    from harness.data.check.folder import check_folder

    report = check_folder(options.folder)
    print(json.dumps(report.as_json(), indent=2) if options.json else report)
    return FAILED if report.failed else FINISHED


def _plan(options: argparse.Namespace) -> int:
    import_quickly("harness.planning.plan")
    from harness.config.stages import load_stages
    from harness.planning.plan import make_plan, render_plan
    from harness.planning.runtime import Hardware

    try:
        steps = [int(step) for step in options.lr_at.split(",") if step.strip()]
    except ValueError:
        raise UserError(f"--lr-at {options.lr_at}: give whole steps, such as 0,390,780") from None
    hardware = Hardware(options.gpus_per_node, options.images_per_second, options.gbit_per_second)
    *teachers, last = load_stages(options.config, options.overrides)
    plan = make_plan(last.config, options.ranks, steps, teachers, hardware)
    print(json.dumps(plan, indent=2) if options.json else render_plan(plan))
    return FINISHED


@unfailing_output()
def _train(options: argparse.Namespace) -> int:
    from harness.config.stages import load_stages

    stages = load_stages(options.config, options.overrides)  # a mistake is told before torch loads
    from harness.config.schema import NO_EXPECTATION

    import_quickly("harness.training.setup")
    from harness.distributed import lost_rank
    from harness.resilience.stopping import Stopped
    from harness.training.setup import train_stages

    first = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0
    try:
        command = resume_command(options)
        result = train_stages(stages, options.out, resume=options.resume, resume_command=command)
    except UserError:
        raise
    except Stopped as stopped:
        if first:
            print(f"{stopped}\nto go on: {resume_command(options)}", flush=True)
        # torchrun takes any other code than 0 for a failure and would start the ranks again
        return FINISHED if "TORCHELASTIC_RUN_ID" in os.environ else STOPPED
    except RunFailed as error:
        # torchrun ends the other ranks as soon as one fails; this one still has a word to say
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _complain(str(error))
        if first:
            print(f"to go on from the last checkpoint: {resume_command(options)}", file=sys.stderr)
        return FAILED
    except Exception as error:
        if lost := lost_rank(error):  # before the run had begun
            _complain(f"another rank ended or is silent: {lost}")
            return FAILED
        if first:  # a bug: its traceback is wanted
            print(f"to go on from the last checkpoint: {resume_command(options)}", file=sys.stderr)
        raise
    if first:
        print(f"error {result.headline}")
        expect = result.config.expect
        print(f"expected {expect}" if expect else NO_EXPECTATION)
        print(f"run folder {result.folder}", flush=True)
    return FINISHED


def _cache(options: argparse.Namespace) -> int:
    from harness.config.stages import load_stages

    *teachers, student = load_stages(options.config, options.overrides)
    config = student.config
    if config.distill is None or config.distill.cache is None:
        raise UserError(f"{options.config}: write the folder to fill in distill.cache")
    if options.epochs < 1:
        raise UserError(f"--epochs {options.epochs}: at least 1 is needed")
    if options.top is not None and not 1 <= options.top < config.data.classes:
        raise UserError(f"--top {options.top}: give 1 to {config.data.classes - 1}, or leave it")
    import_quickly("harness.training.setup")
    from harness.distributed import lost_rank
    from harness.training.setup import cache_soft_targets

    try:
        folder = cache_soft_targets(config, teachers, options.epochs, options.dtype, options.top)
    except RunFailed as error:
        _complain(str(error))
        return FAILED
    except RuntimeError as error:
        if lost := lost_rank(error):
            _complain(f"another rank ended or is silent: {lost}")
            return FAILED
        raise
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0:
        print(f"cache written: {folder}", flush=True)
    return FINISHED


def resume_command(options: argparse.Namespace) -> str:
    """The command that goes on with this run, as the user launched it."""
    words = ["harness"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // local_ranks
        words = ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else [])]
        words += ["--nproc-per-node", str(local_ranks), "-m", "harness"]
    words += ["train", options.config, *options.overrides]
    if options.out is not None:
        words += ["--out", str(options.out)]
    return shlex.join([*words, "--resume"])


def _verify(options: argparse.Namespace) -> int:
    from harness.config.loading import load_config

    try:
        ranks = [int(world_size) for world_size in options.ranks.split(",") if world_size.strip()]
    except ValueError:
        raise UserError(f"--ranks {options.ranks}: give whole numbers, such as 1,2,4") from None
    config = load_config(options.config, options.overrides)  # a mistake is told before torch loads
    from harness.verify import verify
    from harness.verify.table import as_mapping, print_lines

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the ranks, removes the files
    lines = verify(config, ranks, options.steps)
    if not options.json:
        return FINISHED if print_lines(config, ranks, options.steps, lines) else FAILED
    found = as_mapping(config, ranks, options.steps, lines)
    print(json.dumps(found, indent=2))
    return FINISHED if found["passed"] else FAILED


def _eval(options: argparse.Namespace) -> int:
    import_quickly("harness.execution.trained_model")
    from harness.execution.trained_model import evaluate_trained, load_trained

    evaluation = evaluate_trained(load_trained(options.run, options.overrides), options.predictions)
    low, high = evaluation.error_interval()
    if options.json:
        keys = ("error", "top5_error", "correct", "total")
        print(
            json.dumps(
                {key: getattr(evaluation, key) for key in keys} | {"error_interval_95": [low, high]}
            )
        )
        return FINISHED
    print(f"error {evaluation.error:.2f} % (95 % interval {low:.2f} to {high:.2f} %)")
    print(f"top-5 error {evaluation.top5_error:.2f} %")
    print(f"{evaluation.correct} of {evaluation.total} images correct")
    return FINISHED


def _report(options: argparse.Namespace) -> int:
    from harness.report import write_report

    print(write_report(options.runs, options.to, options.assets))
    return FINISHED


def _export(options: argparse.Namespace) -> int:
    import_quickly("harness.execution.trained_model")
    from harness.execution.trained_model import export_trained, load_trained

    print(export_trained(load_trained(options.run), options.to))
    return FINISHED
