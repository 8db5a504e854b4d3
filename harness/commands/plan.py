"""`harness plan`: the dry run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from harness.commands.parsing import Subparsers, add_config
from harness.errors import FINISHED, UserError
from harness.startup import import_quickly


def add(commands: Subparsers) -> None:
    """Add the command to the parser."""
    plan = commands.add_parser("plan", help="show what would run; needs neither data nor GPU")
    add_config(plan)
    plan.add_argument("--ranks", type=int, default=1, metavar="W", help="world size (default 1)")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.add_argument(
        "--lr-at", default="", metavar="STEP,…", help="show the learning rate at these steps"
    )
    assumed = plan.add_argument_group("assumptions of the predicted times (docs/scaling.md)")
    assumed.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="default 8")
    assumed.add_argument(
        "--images-per-second", type=float, metavar="X", help="measured throughput of one GPU alone"
    )
    assumed.add_argument(
        "--gbit-per-second",
        type=float,
        default=400,
        metavar="B",
        help="bandwidth of each GPU between nodes; default 400",
    )
    plan.add_argument(
        "--noise-from",
        type=Path,
        metavar="RUN",
        help="a run with run.noise_scale_every: what its noise says of this minibatch",
    )
    plan.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    import_quickly("harness.planning.plan")
    from harness.config.stages import load_stages
    from harness.planning.noise_forecast import forecast_noise
    from harness.planning.plan import make_plan
    from harness.planning.plan_text import render_plan
    from harness.planning.runtime import Hardware

    try:
        steps = [int(step) for step in options.lr_at.split(",") if step.strip()]
    except ValueError:
        raise UserError(f"--lr-at {options.lr_at}: give whole numbers, such as 0,390,780") from None
    hardware = Hardware(options.gpus_per_node, options.images_per_second, options.gbit_per_second)
    *teachers, last = load_stages(options.config, options.overrides)
    plan = make_plan(last.config, options.ranks, steps, teachers, hardware)
    if options.noise_from is not None:
        plan["noise"] = forecast_noise(last.config, options.noise_from)
    print(json.dumps(plan, indent=2) if options.json else render_plan(plan))
    return FINISHED
