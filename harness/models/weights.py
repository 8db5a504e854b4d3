"""Trained weights: loaded into a network with a classifier of its own, and their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from harness.errors import UserError
from harness.models.weights_file import WeightsFile, read_weights

MODEL = "model.name, model.width or model.options"


@dataclass(frozen=True)
class LoadedWeights:
    """Weights that a network started from.

    Attributes:
        source: Where they were found.
        classifier: Name of the module that kept its initial values; empty where none did.
        classes: Number of classes in the file; 0 where it has no classifier.
        own_classes: Number of classes of the network.

    """

    source: WeightsFile
    classifier: str = ""
    classes: int = 0
    own_classes: int = 0

    def __str__(self) -> str:
        if not self.classifier:
            return f"{self.source}: all weights, the classifier included"
        there = f"{self.classes} classes there" if self.classes else "the file has none"
        return (
            f"{self.source}: all weights but the classifier {self.classifier}, which is "
            f"re-initialized ({there}, {self.own_classes} here)"
        )


def load_weights(
    model: nn.Module,
    path: Path,
    key: str = "model.weights",
    owner: str = MODEL,
    classifier: str = "",
) -> LoadedWeights:
    """Load a state dict into `model`: every entry, each in its shape.

    `classifier` names the module that may be missing from the file, or be for another number of
    classes: it then keeps the model's values. In messages, `key` is the config key that names the
    file and `owner` those that determine the network. Raises UserError with the file and the first
    entry that does not fit.
    """
    expected = model.state_dict()
    modules = {name.partition(".")[0] for name in expected}
    source = read_weights(path, key, modules)
    own = {name: tensor for name, tensor in expected.items() if _within(name, classifier)}
    kept = own if _differs_by_classes(own, source.tensors) else {}
    theirs = {name: tensor for name, tensor in source.tensors.items() if name not in kept}
    needed = {name: tensor for name, tensor in expected.items() if name not in kept}
    if misfit := _misfit(needed, theirs):
        raise UserError(f"{key}: {source}: {misfit}; it is for another {owner}")
    # A plain dict lacks the version that torch.save adds, so PyTorch fills in num_batches_tracked.
    model.load_state_dict({**theirs, **kept}, strict=True)
    if not kept:
        return LoadedWeights(source)
    there = next((len(source.tensors[name]) for name in kept if name in source.tensors), 0)
    return LoadedWeights(source, classifier, there, len(next(iter(kept.values()))))


def _within(name: str, module: str) -> bool:
    return bool(module) and name.startswith(f"{module}.")


def _differs_by_classes(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Return whether the classifier `own` is missing in `theirs`, or has other rows only."""
    found = [(tensor.shape, theirs[name].shape) for name, tensor in own.items() if name in theirs]
    if not found:
        return bool(own)
    rows = {(mine[:1], other[:1]) for mine, other in found}
    alike = all(mine[1:] == other[1:] for mine, other in found)
    return len(found) == len(own) and alike and len(rows) == 1 and any(a != b for a, b in rows)


def _misfit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Describe the first entry of `found` that does not fit; empty for none."""
    for name in expected:
        # a file from before PyTorch 0.4.1 has no num_batches_tracked
        if name not in found and not name.endswith(".num_batches_tracked"):
            return f"key {name!r} is missing"
    for name, tensor in found.items():
        if name not in expected:
            return f"key {name!r} is not in the model"
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
            return f"key {name!r} has the shape {shapes}"
    return ""


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and bytes of a state dict, 64 hex digits."""
    total = hashlib.sha256()
    for name, value in state.items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
