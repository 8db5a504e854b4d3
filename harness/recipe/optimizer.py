"""Optimizers by name: SGD as in remarks 1 to 3 of section 3, LARS, and those of packages.

Remark 1, "Scaling the cross-entropy loss is not equivalent to scaling the learning rate": one
update is w' = w - ηλw - η(1/kn)Σ∇l, and λw does not pass through the loss. So the learning rate is
scaled, never the loss.

Remark 2, momentum correction. `torch.optim.SGD` is form (9):
    u' = m u + g,      w' = w - η u'
where u contains no learning rate, so η may change at any step. Form (10), which absorbs η,
    v' = m v + η g,    w' = w - v'
has v = η u only while η is constant. When η becomes η', it needs the correction
v' = m (η'/η) v + η' g, which form (9) avoids. The same holds with Nesterov's update,
w' = w - η (g + m u').

Remark 3: each loss is normalized by kn, not n (`losses.training_loss`), and gradients are summed
over micro-batches and ranks, so they are Σ∇l/(kn) however the ranks share the minibatch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from harness.compat import BatchNorm
from harness.config.errors import ConfigError
from harness.installed import find, installed
from harness.recipe.lars import build_lars

if TYPE_CHECKING:
    from harness.config.schema import RecipeConfig

GROUP = "harness.optimizers"  # where packages register a build function by the optimizer's name
CHECKED_STEPS = 2  # the second one starts from state

ParameterGroup = dict[str, Any]  # as in torch.optim: "params" and their "weight_decay"
# Called with the parameter groups and, as keywords, the options of the config.
BuildOptimizer = Callable[..., torch.optim.Optimizer]


def batch_norm_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return γ and β of every batch norm, which are not decayed.

    Section 5.1: weight decay not on "the learnable BN coefficients (namely, γ and β)". Chosen by
    module type: torchvision calls some batch norms `downsample.1`. The fc bias is decayed.
    """
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    return [parameter for norm in norms for parameter in norm.parameters(recurse=False)]


def parameter_groups(
    network: nn.Module,
    weight_decay: float,
    undecayed: Collection[nn.Parameter],
    faster: Collection[nn.Parameter] = (),
    lr_factor: float = 1.0,
) -> list[ParameterGroup]:
    """Return two groups in model order: the decayed parameters, and those in `undecayed`.

    Those in `faster` follow in two groups of their own, with `lr_factor` times the learning rate.
    Frozen parameters are in none.
    """
    fast = {id(parameter) for parameter in faster}
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = _by_decay([p for p in trained if id(p) not in fast], weight_decay, undecayed)
    if faster:
        others = _by_decay([p for p in trained if id(p) in fast], weight_decay, undecayed)
        groups += [group | {"lr_factor": lr_factor} for group in others]
    return groups


def _by_decay(
    parameters: list[nn.Parameter], weight_decay: float, undecayed: Collection[nn.Parameter]
) -> list[ParameterGroup]:
    apart = {id(parameter) for parameter in undecayed}
    return [
        {"params": [p for p in parameters if id(p) not in apart], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in apart], "weight_decay": 0.0},
    ]


def find_optimizer(name: str) -> BuildOptimizer:
    """Return the build function of the optimizer `name`. Raises as `build_optimizer`."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    known = ", ".join(BUILT_IN)
    return cast(BuildOptimizer, find(GROUP, name, "recipe.optimizer", "optimizer", known))


def build_optimizer(
    network: nn.Module,
    recipe: RecipeConfig,
    undecayed: Collection[nn.Parameter],
    faster: Collection[nn.Parameter] = (),
    lr_factor: float = 1.0,
) -> torch.optim.Optimizer:
    """Build the optimizer of a network on its device; its learning rate is set at each step.

    `undecayed`, `faster` and `lr_factor` are those of `parameter_groups`. Raises ConfigError for
    an unknown name or option, and UserError for a package that cannot be imported.
    """
    build, options = find_optimizer(recipe.optimizer), recipe.optimizer_arguments
    groups = parameter_groups(network, recipe.weight_decay, undecayed, faster, lr_factor)
    try:
        optimizer = build(groups, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"recipe.optimizer_options: {recipe.optimizer} cannot be built with {options}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"recipe.optimizer: {recipe.optimizer} is a {type(optimizer).__name__} instead of a "
            "torch.optim.Optimizer; repair its package"
        )
    return optimizer


def check_optimizer(
    network: nn.Module,
    recipe: RecipeConfig,
    undecayed: Callable[[nn.Module], Collection[nn.Parameter]],
) -> None:
    """Raise ConfigError where the optimizer cannot be built, or makes updates of its own each time.

    All ranks must make the same update, so an optimizer of a package repeats its first steps on a
    copy of `network` and must arrive at the same bits. A package cannot replace a built-in one.
    """
    if recipe.optimizer in BUILT_IN:
        if point := installed(GROUP).get(recipe.optimizer):
            raise ConfigError(
                f"recipe.optimizer: {recipe.optimizer} is built in, but {point.value} has the same "
                "name; rename the package's optimizer, or uninstall it"
            )
        build_optimizer(network, recipe, undecayed(network))
        return
    ends = [_first_steps(copy.deepcopy(network), recipe, undecayed) for _ in range(2)]
    if not all(map(torch.equal, *ends)):
        raise ConfigError(
            f"recipe.optimizer: {recipe.optimizer} makes other updates when its steps are "
            "repeated, so the ranks' weights would differ; remove what it draws at random"
        )


def _first_steps(
    network: nn.Module,
    recipe: RecipeConfig,
    undecayed: Callable[[nn.Module], Collection[nn.Parameter]],
) -> list[Tensor]:
    """Return the weights after a few steps with equal gradients; what is not finite counts as 0."""
    optimizer = build_optimizer(network, recipe, undecayed(network))
    set_lr(optimizer, recipe.reference_lr)
    for _ in range(CHECKED_STEPS):
        optimizer.zero_grad()
        torch.stack([parameter.sum() for parameter in network.parameters()]).sum().backward()
        optimizer.step()
    return [parameter.detach().nan_to_num(0, 0, 0) for parameter in network.parameters()]


def build_sgd(
    groups: list[ParameterGroup], momentum: float, nesterov: bool
) -> torch.optim.Optimizer:
    """Build SGD of form (9)."""
    optimizer = torch.optim.SGD(
        groups,
        lr=0.0,
        momentum=momentum,
        nesterov=nesterov,
        # Fused SGD passes over the weights fewest times, on the CPU too. After a float16 overflow
        # it skips the update on the device; for others GradScaler waits for the device.
        fused=True,
    )
    if momentum:
        # With u = 0 the first step has u' = g, as in SGD's own first step. By itself, fused SGD
        # allocates u without values, and where the first step overflows it keeps them.
        for group in groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


BUILT_IN: dict[str, BuildOptimizer] = {"sgd": build_sgd, "lars": build_lars}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set η of the next update in every group, times the group's own factor if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
