"""A family of networks: how they are built, and which rules of the recipe apply to them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from harness.recipe.optimizer import batch_norm_parameters

Option = bool | int | float | str  # a value of model.options


@dataclass(frozen=True)
class ResidualBlock:
    """A residual block, and the last batch norm of its residual branch."""

    module: nn.Module
    last_norm: nn.BatchNorm2d


def last_layer(network: nn.Module) -> nn.Module | None:
    """Return the module defined last among those with a weight matrix or kernel."""
    layers = [
        module
        for module in network.modules()
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.ndim > 1
    ]
    return layers[-1] if layers else None


def no_residual_blocks(network: nn.Module) -> Sequence[ResidualBlock]:
    """Return no blocks, for a family that names none."""
    return ()


@dataclass(frozen=True)
class ModelFamily:
    """Networks that are built alike and follow the same rules. docs/networks.md shows an example.

    Attributes:
        name: The family in plans and messages.
        names: The values of `model.name` that it builds.
        build: `build(name, classes, options)` returns a network on the CPU in float32, from images
            (B, 3, H, W) to logits (B, classes). `options` is the config's `model.options`; raise
            TypeError or ValueError for one that the network does not have.
        initialize: `initialize(network, seed)` sets all parameters, each drawn from (seed, its
            name) alone. With None they keep the values that `build` drew from PyTorch's default
            generator, which is seeded for it.
        residual_blocks: The blocks whose last γ starts at `model.last_gamma`. They are also what
            torch.compile compiles, one by one; a network without any is compiled as a whole.
        undecayed: Return the parameters without weight decay.
        classifier: Return the module whose weight has a row for each class, or None. Fine-tuning
            re-initializes it for other classes, and may train it alone.

    """

    name: str
    names: Collection[str]
    build: Callable[[str, int, Mapping[str, Option]], nn.Module]
    initialize: Callable[[nn.Module, int], None] | None = None
    residual_blocks: Callable[[nn.Module], Sequence[ResidualBlock]] = no_residual_blocks
    undecayed: Callable[[nn.Module], Collection[nn.Parameter]] = batch_norm_parameters
    classifier: Callable[[nn.Module], nn.Module | None] = last_layer
