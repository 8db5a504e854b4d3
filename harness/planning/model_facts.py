"""Facts about a network and its optimizer, read off both, and the paper's rules checked on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypedDict

import torch
from torch import nn

from harness.compat import BatchNorm
from harness.config.schema import Config, Options
from harness.models.cifar_resnet import SMALL_RESNET
from harness.models.family import ModelFamily
from harness.models.registry import find_family
from harness.models.torchvision_networks import RESNET
from harness.models.weights import LoadedWeights
from harness.recipe.initialization import initialize

FC_STD = 0.01  # section 5.1: "a zero-mean Gaussian with standard deviation of 0.01"
PAPER_NETWORKS = (RESNET, SMALL_RESNET)  # whose training the tests prove
SIGMAS = 6  # a measured std may be this many of its own standard errors off


class ModelFacts(TypedDict):
    """Facts that `inspect_model` reads; None where the paper's rule does not apply."""

    optimizer: str
    optimizer_options: Options
    family: str
    initialization: str
    weights: str | None
    weights_loaded: str | None  # in words; None where a resumed run needs none
    classifier_reinitialized: bool
    last_gamma: int
    weight_decay: float
    parameters: int
    parameters_frozen: int  # by model.freeze
    classifier_lr_factor: float
    parameters_decayed: int
    parameters_undecayed: int
    decayed_modules: list[str]
    undecayed_modules: list[str]
    parameters_layer_wise: int | None  # None where no parameter has a learning rate of its own
    layer_wise_modules: list[str]
    vectors: int  # biases, γ and β
    vectors_layer_wise: int
    batch_norms: int
    batch_norms_undecayed: int
    residual_blocks: int
    zero_gammas: int
    fc_std: float | None
    fc_std_as_drawn: bool | None
    fc_bias: float | None
    convolutions: int
    convolutions_as_drawn: int | None
    unchecked: list[str]


class Check(TypedDict):
    """One rule. `ok` is None where it does not apply, so that the finding is only reported."""

    what: str
    ok: bool | None


def inspect_model(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    loaded: LoadedWeights | None = None,
) -> ModelFacts:
    """Read the facts off the model and the optimizer that a run would use; assume nothing.

    `loaded` are the weights that the model starts from.
    """
    decayed: set[nn.Parameter] = set()
    undecayed: set[nn.Parameter] = set()
    layer_wise: set[nn.Parameter] = set()
    for group in optimizer.param_groups:
        (decayed if group["weight_decay"] > 0 else undecayed).update(group["params"])
        layer_wise.update(group["params"] if group.get("trust_coefficient") else ())
    vectors = {p for p in model.parameters() if p.ndim <= 1}
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    batch_norms = [norm for norm in norms if norm.weight.requires_grad]
    family = find_family(config.model.name)
    by_paper = family.initialize is initialize
    last_gammas = [block.last_norm.weight for block in family.residual_blocks(model)]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    fc = linear[-1] if linear and by_paper else None
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return {
        "optimizer": config.recipe.optimizer,
        "optimizer_options": config.recipe.optimizer_arguments,
        "family": family.name,
        "initialization": _initialization(family),
        "weights": config.model.weights and str(config.model.weights),
        "weights_loaded": str(loaded) if loaded else None,
        "classifier_reinitialized": bool(loaded and loaded.classifier),
        "last_gamma": config.model.last_gamma,
        "weight_decay": config.recipe.weight_decay,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_frozen": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "classifier_lr_factor": config.recipe.classifier_lr_factor,
        "parameters_decayed": sum(p.numel() for p in decayed),
        "parameters_undecayed": sum(p.numel() for p in undecayed),
        "decayed_modules": _owners(model, decayed),
        "undecayed_modules": _owners(model, undecayed),
        "parameters_layer_wise": sum(p.numel() for p in layer_wise) or None,
        "layer_wise_modules": _owners(model, layer_wise),
        "vectors": len(vectors),
        "vectors_layer_wise": len(vectors & layer_wise),
        "batch_norms": len(batch_norms),
        "batch_norms_undecayed": sum({bn.weight, bn.bias} <= undecayed for bn in batch_norms),
        "residual_blocks": len(last_gammas),
        "zero_gammas": sum(not gamma.any() for gamma in last_gammas),
        "fc_std": None if fc is None else _std(fc.weight),
        "fc_std_as_drawn": None if fc is None else _drawn_with(fc.weight, FC_STD),
        "fc_bias": None if fc is None else float(fc.bias.detach().abs().max()),
        "convolutions": len(convolutions),
        "convolutions_as_drawn": sum(_drawn_with(c.weight, _he_std(c)) for c in convolutions)
        if by_paper
        else None,
        "unchecked": _unchecked(family, bool(last_gammas)),
    }


def _initialization(family: ModelFamily) -> str:
    if family.initialize is initialize:
        return "section 5.1, from (seed, parameter name)"
    if family.initialize is not None:
        return "the family's rules, from (seed, parameter name)"
    return "the network's own, from (seed, model.name)"


def _unchecked(family: ModelFamily, has_blocks: bool) -> list[str]:
    """Return what cannot be checked about the network and its rules."""
    unchecked = []
    if family.initialize is not initialize:
        unchecked.append(f"initial values: {_initialization(family)}")
    if not has_blocks:
        unchecked.append("last γ of residual blocks: the family names no blocks")
    if family not in PAPER_NETWORKS:
        unchecked.append(
            "whether images of other workers, or draws outside PyTorch, change logits: harness "
            "verify does"
        )
    return unchecked


def _owners(model: nn.Module, parameters: set[nn.Parameter]) -> list[str]:
    """Return the types of the modules that hold any of `parameters`."""
    owners = (m for m in model.modules() if not parameters.isdisjoint(m.parameters(recurse=False)))
    return sorted({type(owner).__name__ for owner in owners})


def _std(weight: torch.Tensor) -> float:
    return float(weight.detach().double().std())


def _drawn_with(weight: torch.Tensor, std: float) -> bool:
    # The std of N Gaussian numbers has a standard error of std / sqrt(2 N).
    return abs(_std(weight) - std) <= SIGMAS * std / math.sqrt(2 * weight.numel())


def _he_std(convolution: nn.Conv2d) -> float:
    """He et al. 2015, fan_out and ReLU: sqrt(2 / (output channels · kernel area))."""
    return math.sqrt(2 / (convolution.weight.shape[0] * math.prod(convolution.kernel_size)))


def check_facts(facts: ModelFacts) -> list[Check]:
    """Check the paper's rules: first the optimizer's, then those of initial values."""
    optimized = facts["parameters_decayed"] + facts["parameters_undecayed"]
    parameters = facts["parameters"] - facts["parameters_frozen"]
    layers, undecayed = facts["batch_norms"], facts["batch_norms_undecayed"]
    checks = [
        (f"{undecayed} of {layers} BN layers undecayed", undecayed == layers),
        (f"{optimized:,} of {parameters:,} parameters optimized", optimized == parameters),
    ]
    if facts["parameters_layer_wise"]:
        vectors = facts["vectors"]
        plain = vectors - facts["vectors_layer_wise"]
        checks.append((f"{plain} of {vectors} biases, γ and β by plain SGD", plain == vectors))
    # weights that were trained follow no such rule
    body = facts["weights"] is None
    classifier = body or facts["classifier_reinitialized"]
    applies = {"body": body, "classifier": classifier}
    return [Check(what=what, ok=ok) for what, ok in checks] + [
        Check(what=what, ok=ok if applies[part] else None)
        for part, what, ok in _initial_checks(facts)
    ]


def _initial_checks(facts: ModelFacts) -> Iterator[tuple[str, str, bool | None]]:
    """Check those rules for initial values that apply to the network's body or classifier."""
    blocks, zero = facts["residual_blocks"], facts["zero_gammas"]
    asked = "" if facts["last_gamma"] == 0 else f" (model.last_gamma is {facts['last_gamma']:g})"
    drawn, convolutions = facts["convolutions_as_drawn"], facts["convolutions"]
    if blocks:
        yield "body", f"{zero} of {blocks} last γ zero{asked}", zero == (0 if asked else blocks)
    if facts["fc_std"] is not None:
        std = f"fc weight std {facts['fc_std']:.4f} (paper: {FC_STD})"
        yield "classifier", std, facts["fc_std_as_drawn"]
        yield "classifier", f"largest fc bias {facts['fc_bias']:.4g}", facts["fc_bias"] == 0
    if drawn is not None:
        what = f"{drawn} of {convolutions} convolutions std √(2/fan_out)"
        yield "body", what, drawn == convolutions
