"""torchvision's networks: its ResNets by the paper's rules, the others with their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from harness.models.family import ModelFamily, Option, ResidualBlock
from harness.recipe.initialization import initialize

NAMES = models.list_models(module=models)  # those that classify images
RESNETS = [
    name for name in NAMES if models.get_model_builder(name).__module__ == models.resnet.__name__
]


def build(name: str, classes: int, options: Mapping[str, Option]) -> nn.Module:
    """Build a network of torchvision without trained weights."""
    return models.get_model(name, weights=None, num_classes=classes, **options)


def residual_blocks(network: nn.Module) -> Sequence[ResidualBlock]:
    """Return every BasicBlock and Bottleneck, in model order."""
    return [
        ResidualBlock(module, module.bn3 if isinstance(module, Bottleneck) else module.bn2)
        for module in network.modules()
        if isinstance(module, (BasicBlock, Bottleneck))
    ]


RESNET = ModelFamily("ResNets of torchvision", RESNETS, build, initialize, residual_blocks)
# The paper has no rules for these: they keep the initialization that torchvision gives them.
OTHERS = ModelFamily(
    "other networks of torchvision", [name for name in NAMES if name not in RESNETS], build
)
