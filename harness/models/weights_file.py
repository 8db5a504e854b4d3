"""Read weights from the files that training scripts write, without running their code."""

from __future__ import annotations

import argparse
import pickle
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness.errors import UserError
from harness.runs.checkpoint import NAME, DamagedCheckpoint, load_checkpoint, newest_checkpoint

# Where scripts keep the network beside optimizer, epoch and arguments, in order of preference.
ENTRIES = ("state_dict", "model", "model_state_dict")
COMPILED = "_orig_mod."  # torch.compile's, in front of or within a name
AVERAGES = "n_averaged"  # the counter of torch.optim.swa_utils.AveragedModel
EXPORTED = "model.safetensors"  # in a folder written by `harness export --format hub`


@dataclass(frozen=True)
class WeightsFile:
    """Named tensors, and how they were found in their file.

    Attributes:
        path: The file; the newest checkpoint of a run folder.
        tensors: The state dict, without wrappers around its names.
        entry: The entry of the file that holds it; empty where the file is the state dict.
        other_entries: Further state dicts in the file, such as averaged weights.
        wrapper: What was removed from the names, such as `module.`.

    """

    path: Path
    tensors: Mapping[str, Tensor]
    entry: str = ""
    other_entries: tuple[str, ...] = ()
    wrapper: str = ""

    def __str__(self) -> str:
        others = " and ".join(map(repr, self.other_entries))
        beside = f" (beside {others})" if others else ""
        entry = f", entry {self.entry!r}{beside}" if self.entry else ""
        return f"{self.path}{entry}" + (f", names without {self.wrapper!r}" * bool(self.wrapper))


def read_weights(path: Path, key: str, modules: Collection[str]) -> WeightsFile:
    """Read a state dict from a file, a checkpoint or a run folder.

    `key` is the config key that names it. `modules` are the top-level modules of the network: a
    first part that all names share, and that is none of them, is a wrapper's. Raises UserError.
    """
    file, content = _read(path, key)
    tensors, entry, others = _state_dict(content, f"{key}: {file}")
    plain = {name.replace(COMPILED, ""): t for name, t in tensors.items() if name != AVERAGES}
    wrapper = COMPILED if any(COMPILED in name for name in tensors) else ""
    while (first := _shared_first_part(plain)) and first not in modules:
        plain = {name.partition(".")[2]: tensor for name, tensor in plain.items()}
        wrapper += f"{first}."
    return WeightsFile(file, plain, entry, others, wrapper)


def _read(path: Path, key: str) -> tuple[Path, object]:
    """Return the file and what it holds."""
    if (path / EXPORTED).is_file():
        path = path / EXPORTED
    try:
        if path.is_dir():
            found = newest_checkpoint(path / "checkpoints", _warn)
            if found is None:
                raise UserError(
                    f"{key}: {path}: a folder without checkpoints; give a run folder, a checkpoint "
                    "or a state dict"
                )
            return found
        if not path.is_file():
            raise UserError(f"{key}: {path}: no such file")
        if NAME.fullmatch(path.name):
            return path, load_checkpoint(path, _warn)
        return path, _load(path)
    except DamagedCheckpoint as error:
        raise UserError(f"{key}: damaged checkpoint: {error}") from error
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile file may raise anything
        raise UserError(f"{key}: {path}: no state dict ({_reason(error, path)})") from error


def _load(path: Path) -> object:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    # the scripts of torchvision and timm keep their arguments in the file; these are only data
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _reason(error: Exception, path: Path) -> str:
    """Return why a file was not read; where it holds other objects than tensors, what to do."""
    if not isinstance(error, pickle.UnpicklingError):
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    try:
        objects = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip archive
        return "not a file of torch.save, or an old one that could run code"
    return (
        f"it holds {', '.join(objects[:3]) or 'objects'} besides tensors, which could run code and "
        "is not loaded; where you trust it, save its state dict alone: "
        "torch.save(model.state_dict(), FILE)"
    )


def _state_dict(content: object, file: str) -> tuple[Mapping[str, Tensor], str, tuple[str, ...]]:
    """Return the state dict in `content`, its entry, and the entries of others."""
    if _is_state_dict(content):
        return content, "", ()  # type: ignore[return-value]
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise UserError(f"{file}: a {kind}, not a state dict of names and tensors")
    found = [name for name, value in content.items() if value and _is_state_dict(value)]
    for name in ENTRIES:
        if name in found:
            return content[name], name, tuple(other for other in found if other != name)
    if found:
        raise UserError(
            f"{file}: holds state dicts under the keys {', '.join(map(repr, found))}; save the one "
            f"to start from alone: torch.save(torch.load(FILE)[{found[0]!r}], NEW)"
        )
    names = ", ".join(map(repr, list(content)[:3]))
    raise UserError(f"{file}: no state dict of names and tensors in it (it holds {names})")


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def _shared_first_part(names: Collection[str]) -> str:
    """Return the part before the first dot if all names share it."""
    firsts = {name.partition(".")[0] if "." in name else "" for name in names}
    return firsts.pop() if len(firsts) == 1 else ""


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
