"""The dry run: what a config would run, and what was checked, without data or GPU."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from harness.config.schema import Config
from harness.config.stages import Stage
from harness.data.sources.registry import data_format
from harness.errors import UserError
from harness.models.registry import (
    build_without_weights,
    check_model,
    load_start_weights,
    optimizer_of,
)
from harness.planning.model_facts import Check, ModelFacts, check_facts, inspect_model
from harness.planning.noise_forecast import NoiseForecast
from harness.planning.runtime import Hardware, Prediction, pass_images, predict, sent_bytes
from harness.recipe.minibatch import Minibatch
from harness.recipe.schedule import final_epochs, lr_at, peak_lr
from harness.runs.logging.installed import load_loggers

CURVE_POINTS = 120  # steps of the plan's learning rate curve


class _Steps(TypedDict):
    workers: int
    worker_batch: int
    minibatch: int
    epochs: int
    steps_per_epoch: int
    total_steps: int
    images: int
    images_used_per_epoch: int
    images_unused_per_epoch: int
    crop: int
    resize: int
    recalibrate_images: int  # before each evaluation


class PlannedStage(TypedDict):
    """A run that comes before this one: its teacher's, or its teacher's teacher's."""

    config: str
    model: str
    total_steps: int
    run_folder: str


class _Distillation(TypedDict):
    unlabelled: int
    distill: dict[str, object] | None  # the section, with both weights resolved
    stages: list[PlannedStage]


class _Ranks(TypedDict):
    ranks: int
    shares: list[list[int]]  # [ranks, workers of each], the largest share first
    micro_batch: int  # images, of the largest share
    micro_batch_measured: bool  # by the run, when it starts
    micro_batches: int  # in one step of the largest share
    sums: str
    unit_images: int  # of a pass where sums are exact
    sent_bytes: int  # in which the ranks send each number of a gradient


class Corner(NamedTuple):
    """A step at which the course of the learning rate changes."""

    step: int
    epoch: float
    lr: float
    what: str


class _LearningRate(TypedDict):
    peak_lr: float
    peak_lr_arithmetic: str
    warmup_steps: int
    lr_corners: list[Corner]
    lr_scale: str  # log or linear
    lr_curve: list[float]  # at CURVE_POINTS evenly spaced steps, from the first to the last


class _Whole(_Steps, _Distillation, _Ranks, _LearningRate, ModelFacts):
    model: str
    expect: dict[str, object] | None
    final_epochs: list[int]  # their median validation error is the run's
    checks: list[Check]
    prediction: Prediction


class Plan(_Whole, total=False):
    """A planned run, as `harness plan --json` prints it."""

    noise: NoiseForecast  # of the run that was asked about
    lr_at: dict[str, float]  # the learning rate at each step that was asked for


def make_plan(
    config: Config,
    ranks: int,
    lr_at_steps: Sequence[int] = (),
    teachers: Sequence[Stage] = (),
    hardware: Hardware = Hardware(),  # noqa: B008 (frozen)
    resuming: bool = False,
) -> Plan:
    """Plan the run of `config` on `ranks` ranks; builds the model on the CPU.

    `teachers` are the preceding stages, which have plans of their own. `hardware` is what the
    predicted times assume. A run that is `resuming` from a checkpoint does not need
    `model.weights`. Raises UserError where a network cannot train on its crops, there are more
    ranks than workers, one of `lr_at_steps` is not a step of the run, or a figure of the hardware
    is not above 0.
    """
    for stage_config in (*(stage.config for stage in teachers), config):
        check_model(stage_config)
        # refuse unknown names, as the run would
        data_format(stage_config.run.data_format)
        load_loggers(stage_config.run.loggers)
    for step in lr_at_steps:
        if not 0 <= step < config.total_steps:
            last = config.total_steps - 1
            raise UserError(f"--lr-at {step}: not a step of this run; its steps are 0 to {last}")
    steps, distillation = _plan_steps(config), _plan_distillation(config, teachers)
    shares, learning_rate = _plan_ranks(config, ranks), _plan_lr(config)
    model = build_without_weights(config)
    loaded = None if resuming else load_start_weights(model, config)
    facts = inspect_model(model, optimizer_of(model, config), config, loaded)
    plan: Plan = {
        "model": config.model.name,
        "expect": config.expect.model_dump(mode="json") if config.expect else None,
        "final_epochs": [*final_epochs(config)],
        **steps,
        **distillation,
        **shares,
        **learning_rate,
        **facts,
        "checks": check_facts(facts),
        "prediction": predict(config, model, ranks, hardware),
    }
    if lr_at_steps:
        plan["lr_at"] = {str(step): lr_at(config, step) for step in lr_at_steps}
    return plan


def _plan_steps(config: Config) -> _Steps:
    used = config.steps_per_epoch * config.recipe.minibatch
    return {
        "workers": config.workers,
        "worker_batch": config.recipe.worker_batch,
        "minibatch": config.recipe.minibatch,
        "epochs": config.recipe.epochs,
        "steps_per_epoch": config.steps_per_epoch,
        "total_steps": config.total_steps,
        "images": config.images,
        "images_used_per_epoch": used,
        "images_unused_per_epoch": config.images - used,
        "crop": config.data.crop,
        "resize": config.data.resize,
        "recalibrate_images": config.run.recalibrate_images,
    }


def _plan_distillation(config: Config, teachers: Sequence[Stage]) -> _Distillation:
    distill = None
    if config.distill:
        hard, soft = config.distill.weights
        weights = {"hard_weight": hard, "soft_weight": soft}
        distill = config.distill.model_dump(mode="json") | weights
    stages: list[PlannedStage] = [
        {
            "config": stage.path,
            "model": stage.config.model.name,
            "total_steps": stage.config.total_steps,
            "run_folder": str(stage.folder),
        }
        for stage in teachers
    ]
    return {"unlabelled": config.data.unlabelled_images, "distill": distill, "stages": stages}


def _plan_ranks(config: Config, ranks: int) -> _Ranks:
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: at least 1 rank is needed")
    minibatch = Minibatch.of(config)
    shares = [len(minibatch.workers_of(rank, ranks)) for rank in range(ranks)]
    size = minibatch.micro_batch_images(max(shares), pass_images(config))
    largest = shares.index(max(shares))
    return {
        "ranks": ranks,
        "shares": [[count, workers] for workers, count in sorted(Counter(shares).items())][::-1],
        "micro_batch": size,
        "micro_batch_measured": pass_images(config) == "auto",
        "micro_batches": len(minibatch.micro_batches(largest, ranks, size)),
        "sums": config.run.sums,
        "unit_images": minibatch.unit_images,
        "sent_bytes": sent_bytes(config.run),
    }


def _plan_lr(config: Config) -> _LearningRate:
    recipe, last = config.recipe, config.total_steps - 1
    ratio = f"{recipe.minibatch}/{recipe.reference_minibatch}"
    peak = peak_lr(recipe)
    arithmetic = {
        "linear": f"{recipe.reference_lr:g} × {ratio} = {peak:.4g}",
        "sqrt": f"{recipe.reference_lr:g} × √({ratio}) = {peak:.4g}",
        "none": f"{peak:g}, not scaled",
    }
    curve = [lr_at(config, last * point // (CURVE_POINTS - 1)) for point in range(CURVE_POINTS)]
    return {
        "peak_lr": peak,
        "peak_lr_arithmetic": arithmetic[recipe.scaling],
        "warmup_steps": config.warmup_steps,
        "lr_corners": [
            Corner(step, step / config.steps_per_epoch, lr_at(config, step), what)
            for step, what in sorted(_corners(config).items())
        ],
        "lr_scale": "log" if recipe.decay == "steps" and min(curve) > 0 else "linear",
        "lr_curve": curve,
    }


def _corners(config: Config) -> dict[int, str]:
    """Map each corner's step to what happens there, which is several things where they meet."""
    recipe = config.recipe
    warmup = config.warmup_steps
    stairs = recipe.milestones if recipe.decay == "steps" else ()
    decays = [epoch * config.steps_per_epoch for epoch in stairs]
    corners: dict[int, list[str]] = defaultdict(list)
    if warmup:
        corners[0].append(f"{recipe.warmup} warm-up starts")
    if warmup not in decays:
        corners[warmup].append("peak")
    corners[warmup].append("end of warm-up" if warmup else "no warm-up")
    if recipe.decay == "cosine":
        corners[warmup].append("cosine starts")
    if recipe.decay == "polynomial":
        corners[warmup].append(f"polynomial of power {recipe.decay_power:g} starts")
    for step in decays:
        corners[step].append(f"× {recipe.decay_factor:g}")
    corners[config.total_steps - 1].append("last step")
    # A warm-up as long as the run ends after the last step, so its end is no corner.
    steps = [step for step in corners if step < config.total_steps]
    return {step: ", ".join(corners[step]) for step in steps}
