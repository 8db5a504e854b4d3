"""A large-minibatch training harness: one recipe, one curve, on 1 GPU or 256.

To use it as a library, import `load_config`, `build_model` and `lr_at` from here, and `train` from
harness.training.setup.
Importing it is cheap: the names below are loaded, with PyTorch, on first use.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.config.loading import load_config
    from harness.config.schema import Config
    from harness.errors import UserError
    from harness.models.registry import build_model
    from harness.recipe.schedule import lr_at

__version__ = (Path(__file__).parent / "VERSION").read_text().strip()
__all__ = ["Config", "UserError", "build_model", "load_config", "lr_at"]

_HOMES = {
    "Config": "harness.config.schema",
    "UserError": "harness.errors",
    "build_model": "harness.models.registry",
    "load_config": "harness.config.loading",
    "lr_at": "harness.recipe.schedule",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
