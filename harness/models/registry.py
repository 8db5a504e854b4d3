"""Models by name: every ResNet of torchvision, and ResNet-8/20/32/56 for small images."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torchvision import models as torchvision_models

from harness.config.errors import ConfigError
from harness.models.cifar_resnet import DEPTHS, CifarResNet
from harness.models.fused_blocks import fuse_blocks
from harness.models.ghost_batch_norm import convert_batch_norms
from harness.models.weights import load_weights
from harness.recipe.initialization import initialize

if TYPE_CHECKING:
    from harness.config.schema import Config, ModelConfig

SMALL = {f"resnet{depth}": depth for depth in DEPTHS}


def model_names() -> list[str]:
    """The names that `model.name` may have."""
    builders = torchvision_models.list_models(module=torchvision_models)
    resnets = torchvision_models.resnet.__name__
    return [
        *SMALL,
        *(n for n in builders if torchvision_models.get_model_builder(n).__module__ == resnets),
    ]


def build_model(config: Config, channels_last: bool = False) -> nn.Module:
    """The config's model in float32 on the CPU, with ghost batch norm, its weights set.

    `channels_last` is the order of a micro-batch that its batch norms are given (see
    `GhostBatchNorm2d`). Raises ConfigError for an unknown name, and UserError for a weights file
    that cannot be read or does not fit.
    """
    model = build_without_weights(config, channels_last)
    load_start_weights(model, config)
    return model


def build_without_weights(config: Config, channels_last: bool = False) -> nn.Module:
    """As `build_model`, but do not read `model.weights`, which a checkpoint will replace.

    The file a run started from may be gone by the time the run is resumed, evaluated or exported.
    """
    model = _bare_model(config.model, config.data.classes)
    convert_batch_norms(model, config.recipe.worker_batch, channels_last)
    fuse_blocks(model)
    initialize(model, config.seed, config.model.last_gamma)
    return model


def load_start_weights(model: nn.Module, config: Config) -> None:
    """Load `model.weights` where the config names a file. Raises UserError as `load_weights`."""
    if config.model.weights is not None:
        load_weights(model, Path(config.model.weights))


def check_model(config: Config) -> None:
    """Raise ConfigError where the config's network is unknown or cannot train on its crops.

    By a forward pass in training on PyTorch's meta device, which has shapes and no data: it finds
    crops that are too small, and a batch norm over one value.
    """
    n, pixels = config.recipe.worker_batch, config.data.crop
    with torch.device("meta"):
        model = _bare_model(config.model, config.data.classes)
        # whether a batch norm has several values depends on whether n is 1, not on how large it is
        images = torch.empty(min(n, 2), 3, pixels, pixels)
    try:
        model.train()(images)
    except (ValueError, RuntimeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"data.crop: {config.model.name} cannot be trained on {pixels} × {pixels} pixels with "
            f"recipe.worker_batch {n} ({why}); raise one of them"
        ) from None


def _bare_model(model: ModelConfig, classes: int) -> nn.Module:
    names = model_names()
    if model.name not in names:
        nearest = difflib.get_close_matches(model.name, names, n=1, cutoff=0.0)[0]
        raise ConfigError(f"model.name: no model {model.name!r}; did you mean {nearest!r}?")
    if model.name in SMALL:
        return CifarResNet(SMALL[model.name], classes, model.width)
    return torchvision_models.get_model(model.name, weights=None, num_classes=classes)
