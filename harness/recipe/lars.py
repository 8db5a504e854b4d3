"""LARS: SGD with a learning rate for each layer (You, Gitman, Ginsburg 2017, arXiv 1708.03888).

With the learning rate η of the schedule, the weights w of a layer and their gradient g,
    λ = trust ‖w‖ / (‖g‖ + decay ‖w‖)
    u' = m u + λ (g + decay w),      w' = w - η u'
λ is 1 where ‖w‖ or ‖g‖ is 0. This is form (9) of remark 2 (`optimizer`): u contains no η, so η may
change at any step. The original is form (10), with η inside of u; they differ wherever η changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from harness.compat import SelfUnscaling


class Lars(SelfUnscaling):
    """LARS for the groups with a `trust_coefficient` above 0, and plain SGD for those with 0.

    All groups have a `weight_decay`. The gradients are overwritten. An update whose float16
    gradients overflowed is skipped on the device.
    """

    def __init__(self, groups: list[dict], momentum: float) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum})
        for group in self.param_groups:
            for weight in group["params"]:
                # with u = 0 the first step has u' = λ (g + decay w)
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        scale, overflow = self.scale_and_overflow()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            gradients = [weight.grad for weight in weights]
            if scale is not None:
                for gradient in gradients:
                    gradient.div_(scale)
            decay = group["weight_decay"]
            if group["trust_coefficient"] > 0:
                for weight, gradient in zip(weights, gradients, strict=True):
                    rate = layer_rate(weight, gradient, group["trust_coefficient"], decay)
                    gradient.add_(weight, alpha=decay).mul_(rate)
                decay = 0.0  # it is in the gradient
            sgd(
                weights,
                gradients,
                [self.state[weight]["momentum_buffer"] for weight in weights],
                fused=True,
                found_inf=overflow,
                weight_decay=decay,
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )


def layer_rate(weight: Tensor, gradient: Tensor, trust: float, decay: float) -> Tensor:
    """Return λ, a number on the device; 1 where the weights or the gradient are 0."""
    of_weight, of_gradient = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(gradient)
    rate = trust * of_weight / (of_gradient + decay * of_weight)
    return torch.where((of_weight > 0) & (of_gradient > 0), rate, 1.0)


def build_lars(
    groups: list[dict], momentum: float, trust_coefficient: float
) -> torch.optim.Optimizer:
    """Build LARS from pairs of groups: decayed and undecayed parameters.

    Biases join the undecayed ones: as the batch norms' γ and β they take plain SGD without decay,
    since a vector of them says nothing of the scale of its layer.
    """
    built = []
    for decayed, undecayed in zip(groups[::2], groups[1::2], strict=True):
        layers = [p for p in decayed["params"] if p.ndim > 1]
        biases = [p for p in decayed["params"] if p.ndim <= 1]
        built += [
            {**decayed, "params": layers, "trust_coefficient": trust_coefficient},
            {**undecayed, "params": biases + undecayed["params"], "trust_coefficient": 0.0},
        ]
    return Lars(built, momentum)
