"""Fast imports, which save a second when a process starts."""

from __future__ import annotations

import atexit
import gc
import sys
from importlib import import_module


def import_quickly(module: str) -> None:
    """Import a module that loads PyTorch, with the garbage collector paused.

    Importing creates half a million permanent objects. The collector would traverse them
    several times meanwhile and again at exit; afterwards it ignores them.
    Does nothing in a process that has already loaded PyTorch, whose collector is its owner's.
    """
    if "torch" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        import_module(module)
        gc.freeze()
        # some libraries (nanobind, in Triton 3.9) report uncollected objects at exit
        atexit.register(gc.unfreeze)
    finally:
        gc.enable()
