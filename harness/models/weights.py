"""State dicts: loaded strictly, without running their code, and their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.errors import UserError


def load_weights(
    model: nn.Module, path: Path, key: str = "model.weights", owner: str = "model.name"
) -> None:
    """Load a state dict (.safetensors, or from torch.save) strictly, without running its code.

    In messages, `key` is the config key that names the file and `owner` the one that names the
    network. Raises UserError with the file and the first entry that does not fit.
    """
    misfit = partial(_misfit, f"{key}: {path}", owner)
    weights = _read_state_dict(path, key)
    expected = model.state_dict()
    for entry in expected:
        # a file from before PyTorch 0.4.1 has no num_batches_tracked
        if entry not in weights and not entry.endswith(".num_batches_tracked"):
            raise misfit(entry, "is missing")
    for entry, weight in weights.items():
        if entry not in expected:
            raise misfit(entry, "is not in the model")
        if weight.shape != expected[entry].shape:
            shapes = f"{tuple(weight.shape)} instead of {tuple(expected[entry].shape)}"
            raise misfit(entry, f"has the shape {shapes}")
    # A plain dict lacks the version that torch.save adds, so PyTorch fills in num_batches_tracked.
    model.load_state_dict(dict(weights), strict=True)


def _misfit(file: str, owner: str, entry: str, what: str) -> UserError:
    return UserError(f"{file}: key {entry!r} {what}; it is for another {owner}")


def _read_state_dict(path: Path, key: str) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{key}: {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{key}: {path}: no state dict ({reason[0]})") from error
    if not isinstance(weights, Mapping) or not all(
        isinstance(key, str) and isinstance(weight, Tensor) for key, weight in weights.items()
    ):
        raise UserError(f"{key}: {path}: not a plain state dict of names and tensors")
    return weights


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and bytes of a state dict, 64 hex digits."""
    total = hashlib.sha256()
    for name, value in state.items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
