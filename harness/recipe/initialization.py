"""Initial weights (section 5.1, "Hyper-parameters"), the same on every device and world size."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from harness.compat import BatchNorm


def residual_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, block) of every residual block, in model order."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (BasicBlock, Bottleneck))
    ]


def last_batch_norm(block: nn.Module) -> nn.BatchNorm2d:
    """The batch norm at the end of a block's residual branch. Raises TypeError for no block."""
    if isinstance(block, Bottleneck):
        norm = block.bn3
    elif isinstance(block, BasicBlock):
        norm = block.bn2
    else:
        raise TypeError(f"{type(block).__name__} is neither a BasicBlock nor a Bottleneck")
    assert isinstance(norm, nn.BatchNorm2d)
    return norm


def _generator(seed: int, name: str) -> torch.Generator:
    """A generator of its own for a parameter, by a hash that no library version changes."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def _draw(parameter: Tensor, std: float, seed: int, name: str) -> None:
    # drawn in float32 on the CPU, whatever the parameter's device and type
    drawn = torch.empty(parameter.shape).normal_(0.0, std, generator=_generator(seed, name))
    parameter.copy_(drawn)


@torch.no_grad()
def initialize(model: nn.Module, seed: int, last_gamma: float = 0) -> None:
    """Sets every parameter in place, each drawn from (seed, its name) alone.

    `last_gamma` is γ of the last batch norm of each residual block (table 2b). Raises TypeError
    for a module with parameters that the recipe has no rule for.
    """
    for name, module in model.named_modules():
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
            raise TypeError(f"{name}: no rule to initialise {module}")
    for _, block in residual_blocks(model):
        # "except for each residual block's last BN where we initialize gamma to be 0"
        last_batch_norm(block).weight.fill_(last_gamma)
