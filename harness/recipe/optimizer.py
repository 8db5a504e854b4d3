"""SGD with momentum, and the algebra of the paper's remarks 1 to 3 (section 3).

Remark 1, "Scaling the cross-entropy loss is not equivalent to scaling the learning rate": one
update is w' = w - ηλw - η(1/kn)Σ∇l, and λw does not pass through the loss. So the learning rate is
scaled, never the loss.

Remark 2, momentum correction. `torch.optim.SGD` is form (9):
    u' = m u + g,      w' = w - η u'
where u holds no learning rate, so η may change at any step. Form (10), which absorbs it,
    v' = m v + η g,    w' = w - v'
has v = η u only while η stays; when η becomes η', it needs the correction v' = m (η'/η) v + η' g,
which form (9) makes needless. The same holds with Nesterov's update, w' = w - η (g + m u').

Remark 3: each loss is normalised by kn, not n (`losses.training_loss`), and gradients are summed
over micro-batches and ranks, so that they are Σ∇l/(kn) whatever the shares of the ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.compat import BatchNorm

if TYPE_CHECKING:
    from harness.config.schema import RecipeConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups in model order: the decayed parameters, and those of batch norm, undecayed.

    Section 5.1: weight decay not on "the learnable BN coefficients (namely, γ and β)". Chosen by
    module type: torchvision calls some batch norms `downsample.1`. The fc bias is decayed.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    undecayed = {id(p) for norm in norms for p in norm.parameters(recurse=False)}
    return [
        {
            "params": [p for p in model.parameters() if id(p) not in undecayed],
            "weight_decay": weight_decay,
        },
        {
            "params": [p for p in model.parameters() if id(p) in undecayed],
            "weight_decay": 0.0,
        },
    ]


def build_optimizer(model: nn.Module, recipe: RecipeConfig) -> torch.optim.SGD:
    """SGD over `parameter_groups`, for a model that is on its device; lr is 0 until `set_lr`."""
    optimizer = torch.optim.SGD(
        parameter_groups(model, recipe.weight_decay),
        lr=0.0,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        # fewest passes over the weights, on the CPU too; and a float16 overflow skips the update on
        # the device, where GradScaler would wait for it with any other kind
        fused=True,
    )
    if recipe.momentum:
        # u = 0 makes the first u' = g exactly, as SGD's own first step. Left to itself, fused SGD
        # allocates u without values, and where the first step overflows it keeps them.
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets η of the next update for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
