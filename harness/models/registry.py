"""Networks by name: those of the harness, of torchvision and of installed packages."""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness.compat import BatchNorm
from harness.config.errors import ConfigError
from harness.errors import UserError
from harness.installed import installed, load
from harness.models.cifar_resnet import SMALL_RESNET
from harness.models.family import ModelFamily
from harness.models.frozen_backbone import freeze_backbone
from harness.models.fused_blocks import fuse_blocks
from harness.models.ghost_batch_norm import convert_batch_norms, is_convertible
from harness.models.torchvision_networks import OTHERS, RESNET
from harness.models.training_pass import try_training_pass
from harness.models.weights import LoadedWeights, load_weights
from harness.recipe.initialization import initialize_last_norms, seed_for
from harness.recipe.optimizer import build_optimizer, check_optimizer

if TYPE_CHECKING:
    from harness.config.schema import Config

GROUP = "harness.models"  # where packages register a ModelFamily
FAMILIES = (SMALL_RESNET, RESNET, OTHERS)


def find_family(name: str) -> ModelFamily:
    """Return the family that builds the network `name`.

    Packages are imported only where no built-in network has the name. Raises ConfigError for an
    unknown name, and UserError for a package that cannot be used.
    """
    for family in FAMILIES:
        if name in family.names:
            return family
    families = [family for _, family in _installed_families()]
    found = [family for family in families if name in family.names]
    if len(found) > 1:
        raise UserError(
            f"model.name: {name!r} is a network of {' and of '.join(f.name for f in found)}; "
            "uninstall one of these packages"
        )
    if not found:
        names = [name for family in (*FAMILIES, *families) for name in family.names]
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"model.name: no model {name!r}; did you mean {nearest!r}? Other networks need their "
            "package installed"
        )
    return found[0]


def entry_point(name: str) -> EntryPoint | None:
    """Return the entry point that adds the network `name`; None where it is built in.

    Raises UserError for a package that cannot be used.
    """
    if any(name in family.names for family in FAMILIES):
        return None
    return next((point for point, family in _installed_families() if name in family.names), None)


def _installed_families() -> list[tuple[EntryPoint, ModelFamily]]:
    families = []
    for point in installed(GROUP).values():
        family = load(point, "model.name")
        if not isinstance(family, ModelFamily):
            raise UserError(
                f"model.name: {point.value} is a {type(family).__name__} instead of a ModelFamily; "
                "repair or uninstall its package"
            )
        families.append((point, family))
    return families


def build_model(config: Config, channels_last: bool = False) -> nn.Module:
    """Build the config's network in float32 on the CPU, with ghost batch norm and start weights.

    `channels_last` is the order of a micro-batch that its batch norms get (see
    `GhostBatchNorm2d`). Raises ConfigError for an unknown name or option, and UserError for a
    weights file that cannot be read or does not fit.
    """
    network = build_without_weights(config, channels_last)
    load_start_weights(network, config)
    return network


def build_without_weights(config: Config, channels_last: bool = False) -> nn.Module:
    """Build as `build_model` does, but do not read `model.weights`, which a checkpoint replaces.

    The file a run started from may no longer exist when the run is resumed, evaluated or exported.
    """
    family, name = find_family(config.model.name), config.model.name
    network = _build_bare(family, config)
    if config.model.freeze == "backbone":
        freeze_backbone(network, require_classifier(network, config))
    convert_batch_norms(network, config.recipe.worker_batch, channels_last)
    fuse_blocks(network)
    if family.initialize is not None:
        try:
            family.initialize(network, config.seed)
        except TypeError as error:
            raise ConfigError(f"model.name: {name} cannot be initialized: {error}") from error
    norms = [block.last_norm for block in family.residual_blocks(network)]
    initialize_last_norms(norms, config.model.last_gamma)
    return network


def load_start_weights(network: nn.Module, config: Config) -> LoadedWeights | None:
    """Load `model.weights` where the config names them. Raises UserError as `load_weights`.

    A classifier for another number of classes keeps its initial values.
    """
    if config.model.weights is None:
        return None
    path, classifier = Path(config.model.weights), classifier_name(network, config)
    return load_weights(network, path, classifier=classifier)


def classifier_name(network: nn.Module, config: Config) -> str:
    """Return the name of the module with a row for each class; empty where it is not known."""
    classifier = find_family(config.model.name).classifier(network)
    weight = getattr(classifier, "weight", None)
    if not isinstance(weight, Tensor) or len(weight) != config.data.classes:
        return ""
    return next(name for name, module in network.named_modules() if module is classifier)


def require_classifier(network: nn.Module, config: Config) -> str:
    """Return `classifier_name`. Raises ConfigError where it is not known."""
    if name := classifier_name(network, config):
        return name
    what = "model.freeze" if config.model.freeze != "none" else "recipe.classifier_lr_factor"
    raise ConfigError(
        f"{what}: {config.model.name} names no classifier with {config.data.classes} rows; remove "
        "the key, or name the classifier in the network's family"
    )


def optimizer_of(network: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Build the optimizer of the config's network, by its family's rules. Raises ConfigError."""
    classifier: list[nn.Parameter] = []
    if (factor := config.recipe.classifier_lr_factor) != 1:
        module = network.get_submodule(require_classifier(network, config))
        classifier = list(module.parameters())
    undecayed = find_family(config.model.name).undecayed(network)
    return build_optimizer(network, config.recipe, undecayed, classifier, factor)


def build_plain(config: Config) -> nn.Module:
    """Build the config's network as its family does, without the harness's own modules."""
    return _build_bare(find_family(config.model.name), config)


def _build_bare(family: ModelFamily, config: Config) -> nn.Module:
    """Build as the family does, with draws that depend on the seed and the name alone."""
    model = config.model
    width = {} if "width" in model.meaningless() else {"width": model.width}
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would seed the GPUs too
        torch.default_generator.manual_seed(seed_for(config.seed, model.name))
        try:
            return family.build(model.name, config.data.classes, width | model.options)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"model.options: {model.name} cannot be built with {model.options}: {_line(error)}"
            ) from error


def check_model(config: Config) -> None:
    """Raise ConfigError where the config's network or optimizer cannot train, or not on one curve.

    By a training pass without data: it finds unsuitable crops, a batch norm over one value, and
    networks whose logits depend on more than images and parameters.
    """
    model, n, pixels = config.model, config.recipe.worker_batch, config.data.crop
    family = find_family(model.name)
    network = _build_bare(family, config)
    _check_batch_norms(network, model.name)
    if model.last_gamma and not family.residual_blocks(network):
        raise ConfigError(
            f"model.last_gamma: {model.name} names no residual blocks that have it; remove it"
        )
    check_optimizer(network, config.recipe, family.undecayed)
    if model.freeze != "none" or config.recipe.classifier_lr_factor != 1:
        require_classifier(network, config)
    # whether a batch norm has several values depends on whether n is 1, not on how large it is
    images = (min(n, 2), 3, pixels, pixels)
    try:
        tried = try_training_pass(network, images)
    except (ValueError, RuntimeError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"data.crop: {model.name} cannot be trained on {pixels} × {pixels} pixels with "
            f"recipe.worker_batch {n} ({_line(error)}); raise one of them, or repair the network"
        ) from None
    logits = tried.output
    if not isinstance(logits, Tensor) or logits.shape != (images[0], config.data.classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"model.name: {model.name} returns {found} in training instead of logits (B, "
            f"{config.data.classes}); give it so many outputs, or turn others off in model.options"
        )
    for module, fault in tried.faults.items():
        raise ConfigError(
            f"model.name: {model.name}: {module or 'its forward pass'} {fault} in training, so the "
            "curve would depend on the number of ranks; turn it off in model.options (such as "
            "dropout: 0), or take another network"
        )


def _check_batch_norms(network: nn.Module, name: str) -> None:
    for place, module in network.named_modules():
        if isinstance(module, BatchNorm) and not is_convertible(module):
            raise ConfigError(
                f"model.name: {name}: {place} is a {module}, whose statistics cannot be kept apart "
                "for each worker; use BatchNorm2d with momentum, γ, β and running statistics"
            )


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
