"""The dry run: what would be run and what was checked, without data or GPU."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from harness.compat import BatchNorm
from harness.config.errors import found
from harness.config.schema import NO_EXPECTATION, Config, ExpectConfig
from harness.config.stages import Stage
from harness.data.sources.registry import data_format
from harness.errors import UserError
from harness.models.cifar_resnet import SMALL_RESNET
from harness.models.family import ModelFamily
from harness.models.registry import (
    build_model,
    build_without_weights,
    check_model,
    find_family,
)
from harness.models.torchvision_networks import RESNET
from harness.planning.lr_plot import COLUMNS, draw_lr
from harness.planning.runtime import Hardware, predict, render_prediction
from harness.recipe.initialization import initialize
from harness.recipe.minibatch import Minibatch
from harness.recipe.optimizer import build_optimizer
from harness.recipe.schedule import error_rule, final_epochs, lr_at, peak_lr

FC_STD = 0.01  # section 5.1: "a zero-mean Gaussian with standard deviation of 0.01"
PAPER_RULES = "section 5.1, from (seed, parameter name)"
PAPER_NETWORKS = (RESNET.name, SMALL_RESNET.name)  # whose training the tests prove
SIGMAS = 6  # a measured std may be this many of its own standard errors off


def make_plan(
    config: Config,
    ranks: int,
    lr_at_steps: Sequence[int] = (),
    teachers: Sequence[Stage] = (),
    hardware: Hardware = Hardware(),  # noqa: B008 (frozen)
    resuming: bool = False,
) -> dict[str, Any]:
    """What `config` would run on `ranks` ranks, JSON-ready; builds the model on the CPU.

    `teachers` are the stages before, whose plans are their own; `hardware`: what the predicted
    times assume. A run that is `resuming` from a checkpoint does not need `model.weights`. Raises
    UserError where a network cannot train on its crops, there are more ranks than workers, one of
    `lr_at_steps` is not a step of the run, or a figure of the hardware is not above 0.
    """
    for stage_config in (*(stage.config for stage in teachers), config):
        check_model(stage_config)
        data_format(stage_config.run.data_format)  # refuses an unknown one
    for step in lr_at_steps:
        if not 0 <= step < config.total_steps:
            last = config.total_steps - 1
            raise UserError(f"--lr-at {step}: not a step of this run; its steps are 0 to {last}")
    plan = {
        "model": config.model.name,
        "expect": config.expect and config.expect.model_dump(mode="json"),
        "final_epochs": [*final_epochs(config)],  # whose median validation error is the run's
        **_plan_steps(config),
        **_plan_distillation(config, teachers),
        **_plan_ranks(config, ranks),
        **_plan_lr(config),
    }
    if lr_at_steps:
        plan["lr_at"] = {str(step): lr_at(config, step) for step in lr_at_steps}
    model = build_without_weights(config) if resuming else build_model(config)
    undecayed = find_family(config.model.name).undecayed(model)
    facts = inspect_model(model, build_optimizer(model, config.recipe, undecayed), config)
    prediction = predict(config, model, ranks, hardware)
    return plan | facts | {"checks": check_facts(facts), "prediction": prediction}


def _plan_steps(config: Config) -> dict[str, Any]:
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
    }


def _plan_distillation(config: Config, teachers: Sequence[Stage]) -> dict[str, Any]:
    """`stages`: those before this one; `distill`: the section, null without one."""
    distill = config.distill and config.distill.model_dump(mode="json")
    if distill and config.distill:
        distill["hard_weight"], distill["soft_weight"] = config.distill.weights
    stages = [
        {
            "config": stage.path,
            "model": stage.config.model.name,
            "total_steps": stage.config.total_steps,
            "run_folder": str(stage.folder),
        }
        for stage in teachers
    ]
    return {"unlabelled": config.data.unlabelled_images, "distill": distill, "stages": stages}


def _plan_ranks(config: Config, ranks: int) -> dict[str, Any]:
    """`shares`: [ranks, workers of each], the largest share first; `micro_batch` in images and
    `micro_batches` a step are those of the largest share."""
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: at least 1 rank is needed")
    minibatch = Minibatch(config.workers, config.recipe.worker_batch)
    shares = [len(minibatch.workers_of(rank, ranks)) for rank in range(ranks)]
    size = minibatch.micro_batch_images(max(shares), config.run.micro_batch)
    largest = shares.index(max(shares))
    return {
        "ranks": ranks,
        "shares": [[count, workers] for workers, count in sorted(Counter(shares).items())][::-1],
        "micro_batch": size,
        "micro_batch_measured": config.run.micro_batch == "auto",  # when the run starts
        "micro_batches": len(minibatch.micro_batches(largest, ranks, size)),
    }


def _plan_lr(config: Config) -> dict[str, Any]:
    """`lr_corners`: [step, epoch, lr, what]; `lr_curve`: lr at evenly spaced steps, the first
    and the last included."""
    recipe, last = config.recipe, config.total_steps - 1
    ratio = f"{recipe.minibatch}/{recipe.reference_minibatch}"
    peak = peak_lr(recipe)
    arithmetic = {
        "linear": f"{recipe.reference_lr:g} × {ratio} = {peak:.4g}",
        "sqrt": f"{recipe.reference_lr:g} × √({ratio}) = {peak:.4g}",
        "none": f"{peak:g}, not scaled",
    }
    corners = [
        [step, step / config.steps_per_epoch, lr_at(config, step), what]
        for step, what in sorted(_corners(config).items())
    ]
    points = 2 * COLUMNS  # a braille character is two dots wide
    curve = [lr_at(config, last * point // (points - 1)) for point in range(points)]
    return {
        "peak_lr": peak,
        "peak_lr_arithmetic": arithmetic[recipe.scaling],
        "warmup_steps": config.warmup_steps,
        "lr_corners": corners,
        "lr_scale": "log" if recipe.decay == "steps" and min(curve) > 0 else "linear",
        "lr_curve": curve,
    }


def _corners(config: Config) -> dict[int, str]:
    """Step -> what happens to the lr there; all of it, where several corners share a step."""
    recipe = config.recipe
    warmup = config.warmup_steps
    cosine = recipe.decay == "cosine"
    decays = [] if cosine else [epoch * config.steps_per_epoch for epoch in recipe.milestones]
    corners: dict[int, list[str]] = defaultdict(list)
    if warmup:
        corners[0].append(f"{recipe.warmup} warm-up starts")
    if warmup not in decays:
        corners[warmup].append("peak")
    corners[warmup].append("end of warm-up" if warmup else "no warm-up")
    if cosine:
        corners[warmup].append("cosine starts")
    for step in decays:
        corners[step].append(f"× {recipe.decay_factor:g}")
    corners[config.total_steps - 1].append("last step")
    # where the warm-up is the whole run, its end is no step of it
    steps = [step for step in corners if step < config.total_steps]
    return {step: ", ".join(corners[step]) for step in steps}


def inspect_model(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: Config
) -> dict[str, Any]:
    """What is read off the model and the optimizer that a run would use, nothing assumed."""
    decayed: set[nn.Parameter] = set()
    undecayed: set[nn.Parameter] = set()
    for group in optimizer.param_groups:
        (decayed if group["weight_decay"] > 0 else undecayed).update(group["params"])
    batch_norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    family = find_family(config.model.name)
    last_gammas = [block.last_norm.weight for block in family.residual_blocks(model)]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    fc = linear[-1] if linear and family.initialize is initialize else None
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return {
        "optimizer": config.recipe.optimizer,
        "optimizer_options": config.recipe.optimizer_arguments,
        "family": family.name,
        "initialization": _initialization(family),
        "weights": config.model.weights and str(config.model.weights),
        "last_gamma": config.model.last_gamma,
        "weight_decay": config.recipe.weight_decay,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_decayed": sum(p.numel() for p in decayed),
        "parameters_undecayed": sum(p.numel() for p in undecayed),
        "decayed_modules": _owners(model, decayed),
        "undecayed_modules": _owners(model, undecayed),
        "batch_norms": len(batch_norms),
        "batch_norms_undecayed": sum({bn.weight, bn.bias} <= undecayed for bn in batch_norms),
        "residual_blocks": len(last_gammas),
        "zero_gammas": sum(not gamma.any() for gamma in last_gammas),
        "fc_std": fc and _std(fc.weight),
        "fc_std_as_drawn": fc and _drawn_with(fc.weight, FC_STD),
        "fc_bias": fc and float(fc.bias.detach().abs().max()),
        "convolutions": len(convolutions),
        "convolutions_as_drawn": sum(_drawn_with(c.weight, _he_std(c)) for c in convolutions),
    }


def _initialization(family: ModelFamily) -> str:
    if family.initialize is initialize:
        return PAPER_RULES
    if family.initialize is not None:
        return "the family's rules, from (seed, parameter name)"
    return "the network's own, from (seed, model.name)"


def _owners(model: nn.Module, parameters: set[nn.Parameter]) -> list[str]:
    """The types of the modules that hold any of `parameters`."""
    owners = (m for m in model.modules() if not parameters.isdisjoint(m.parameters(recurse=False)))
    return sorted({type(owner).__name__ for owner in owners})


def _std(weight: torch.Tensor) -> float:
    return float(weight.detach().double().std())


def _drawn_with(weight: torch.Tensor, std: float) -> bool:
    # the std of N Gaussian numbers has a standard error of std / sqrt(2 N)
    return abs(_std(weight) - std) <= SIGMAS * std / math.sqrt(2 * weight.numel())


def _he_std(convolution: nn.Conv2d) -> float:
    """He et al. 2015, fan_out and ReLU: sqrt(2 / (output channels · kernel area))."""
    return math.sqrt(2 / (convolution.weight.shape[0] * math.prod(convolution.kernel_size)))


def check_facts(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """[{what, ok}]; `ok` is null for what is only reported, as it may be anything."""
    optimized = facts["parameters_decayed"] + facts["parameters_undecayed"]
    parameters = facts["parameters"]
    layers, undecayed = facts["batch_norms"], facts["batch_norms_undecayed"]
    checks: list[tuple[str, bool]] = [
        (f"{undecayed} of {layers} BN layers undecayed", undecayed == layers),
        (f"{optimized:,} of {parameters:,} parameters optimized", optimized == parameters),
    ]
    loaded = facts["weights"] is not None  # such weights are as they were trained
    return [{"what": what, "ok": ok} for what, ok in checks] + [
        {"what": what, "ok": None if loaded else ok} for what, ok in _initial_checks(facts)
    ]


def _initial_checks(facts: dict[str, Any]) -> list[tuple[str, bool]]:
    """Return the checks of those rules for initial values that apply to the network."""
    blocks, zero = facts["residual_blocks"], facts["zero_gammas"]
    asked = "" if facts["last_gamma"] == 0 else f" (model.last_gamma is {facts['last_gamma']:g})"
    drawn, convolutions = facts["convolutions_as_drawn"], facts["convolutions"]
    checks: list[tuple[str, bool]] = []
    if blocks:
        checks.append((f"{zero} of {blocks} last γ zero{asked}", zero == (0 if asked else blocks)))
    if facts["fc_std"] is not None:
        paper = f"fc weight std {facts['fc_std']:.4f} (paper: {FC_STD})"
        checks.append((paper, facts["fc_std_as_drawn"]))
        checks.append((f"largest fc bias {facts['fc_bias']:.4g}", facts["fc_bias"] == 0))
    if facts["initialization"] == PAPER_RULES:
        as_drawn = f"{drawn} of {convolutions} convolutions std √(2/fan_out)"
        checks.append((as_drawn, drawn == convolutions))
    return checks


def _unchecked(plan: dict[str, Any]) -> list[str]:
    """Return what the plan cannot check about the network and its rules."""
    unchecked = []
    if plan["initialization"] != PAPER_RULES:
        unchecked.append(f"initial values: {plan['initialization']}")
    if not plan["residual_blocks"]:
        unchecked.append("last γ of residual blocks: the family names no blocks")
    if plan["family"] not in PAPER_NETWORKS:
        unchecked.append(
            "whether images of other workers, or draws outside PyTorch, change logits: harness "
            "verify does"
        )
    return unchecked


def render_plan(plan: dict[str, Any]) -> str:
    """What a person reads: some 40 lines of about 100 characters at most."""
    pages = (_summary, draw_lr, _lr_table, _parameters, render_prediction)
    parts = (page(plan) for page in pages)
    return "\n\n".join("\n".join(lines) for lines in parts)


def _summary(plan: dict[str, Any]) -> list[str]:
    expect = f"error {ExpectConfig(**plan['expect'])}" if plan["expect"] else NO_EXPECTATION
    return [
        f"model        {plan['model']}, {plan['epochs']} epochs of {plan['images']:,} images",
        f"expected     {expect}",
        f"             a run's error: {error_rule(plan['final_epochs'])}",
        f"minibatch    k = {_count(plan['workers'], 'worker')}, "
        f"n = {_count(plan['worker_batch'], 'image')} each: "
        f"kn = {plan['minibatch']:,} images",
        f"ranks        {_ranks_line(plan)}",
        *["             unless the run measures another size as faster, and rounds otherwise"]
        * plan["micro_batch_measured"],
        f"steps        {plan['steps_per_epoch']:,} an epoch, {plan['total_steps']:,} in all",
        f"images       {plan['images_used_per_epoch']:,} used in an epoch, "
        f"{plan['images_unused_per_epoch']:,} left over (others each time)",
        f"crop         {plan['crop']} pixels; evaluation: short side to {plan['resize']}, then the "
        f"central {plan['crop']}",
        f"peak lr      {plan['peak_lr_arithmetic']}",
        *_distillation(plan),
    ]


def _distillation(plan: dict[str, Any]) -> list[str]:
    lines = [
        f"stage {number}      {stage['config']}: {stage['model']}, {stage['total_steps']:,} steps, "
        f"unless {stage['run_folder']} is finished"
        for number, stage in enumerate(plan["stages"], 1)
    ]
    if distill := plan["distill"]:
        hard, soft, T = (distill[key] for key in ("hard_weight", "soft_weight", "temperature"))
        source = f"cached in {distill['cache']}" if distill["cache"] else "live"
        lines += [
            f"teacher      {distill['teacher']}, in {distill['precision']}, {source}",
            f"loss         {hard:g} × CE(labels) + {soft:g} × {T:g}² × CE(soft targets, T = {T:g})",
        ]
    if plan["unlabelled"]:
        lines.append(f"unlabelled   {plan['unlabelled']:,} of the {plan['images']:,} images")
    return lines


def _ranks_line(plan: dict[str, Any]) -> str:
    shares = ", ".join(f"{ranks} × {_count(n, 'worker')}" for ranks, n in plan["shares"])
    passes = _count(plan["micro_batches"], "micro-batch", "es")
    images = _count(plan["micro_batch"], "image")
    return f"{plan['ranks']} ({shares}), a step in at most {passes} of at most {images}"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _lr_table(plan: dict[str, Any]) -> list[str]:
    rows = {step: (epoch, lr, what) for step, epoch, lr, what in plan["lr_corners"]}
    for key, lr in plan.get("lr_at", {}).items():
        rows.setdefault(int(key), (int(key) / plan["steps_per_epoch"], lr, ""))
    lines = [f"{'step':>10}  {'epoch':>7}  {'lr':>10}"]
    for step, (epoch, lr, what) in sorted(rows.items()):
        lines.append(f"{step:>10,}  {epoch:>7.4g}  {lr:>10.4g}  {what}".rstrip())
    return lines


def _parameters(plan: dict[str, Any]) -> list[str]:
    mark = {True: "ok", False: "FAILED", None: "loaded"}
    options = "".join(f", {name} {found(v)}" for name, v in plan["optimizer_options"].items())
    lines = [
        f"optimizer    {plan['optimizer']}{options}",
        f"network      of the family {plan['family']!r}",
        f"parameters   {plan['parameters']:,}",
        f"  decayed    {plan['parameters_decayed']:,} by {plan['weight_decay']:g}: "
        + ", ".join(plan["decayed_modules"]),
        f"  undecayed  {plan['parameters_undecayed']:,}: " + ", ".join(plan["undecayed_modules"]),
        "checked on the model and the optimizer, as a run would build them",
        *(f"  {mark[check['ok']]:9}  {check['what']}" for check in plan["checks"]),
    ]
    lines += [f"  unchecked  {what}" for what in _unchecked(plan)]
    if plan["weights"] is not None:
        lines.append(f"  loaded: not initial values, but those of {plan['weights']}")
    return lines
