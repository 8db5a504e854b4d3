"""Initial weights (section 5.1, "Hyper-parameters"), equal on every device and world size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from harness.compat import BatchNorm


def seed_for(seed: int, name: str) -> int:
    """Return a 64-bit seed for `name`, by a hash that no library version changes."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _draw(parameter: Tensor, std: float, seed: int, name: str) -> None:
    generator = torch.Generator().manual_seed(seed_for(seed, name))
    # drawn in float32 on the CPU, whatever the parameter's device and type
    drawn = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
    parameter.copy_(drawn)


@torch.no_grad()
def initialize(network: nn.Module, seed: int) -> None:
    """Set every parameter in place, each drawn from (seed, its name) alone.

    Raises TypeError for a module with parameters that the recipe has no rule for.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            # "as in [16]": He et al. 2015, by fan_out = out_channels * k * k, variance 2 / fan_out
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            _draw(module.weight, (2.0 / fan_out) ** 0.5, seed, f"{name}.weight")
        elif isinstance(module, nn.Linear) and module.bias is not None:
            # "zero-mean Gaussian with standard deviation of 0.01"; not a variance of 0.01
            _draw(module.weight, 0.01, seed, f"{name}.weight")
            module.bias.zero_()  # not in the paper; fb.resnet.torch, which it builds on
        elif isinstance(module, BatchNorm):
            module.reset_running_stats()
            module.weight.fill_(1.0)
            module.bias.zero_()
        elif next(module.parameters(recurse=False), None) is not None:
            raise TypeError(f"{name}: section 5.1 has no rule for {module}")


@torch.no_grad()
def initialize_last_norms(norms: Iterable[nn.BatchNorm2d], gamma: float) -> None:
    """Set γ of the last batch norm of each residual block.

    Section 5.1: "except for each residual block's last BN where we initialize γ to be 0"; table 2b
    compares it with 1.
    """
    for norm in norms:
        norm.weight.fill_(gamma)
