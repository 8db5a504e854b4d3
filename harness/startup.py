"""Start a process a second faster."""

from __future__ import annotations

import atexit
import gc
import sys
from importlib import import_module


def import_quickly(module: str) -> None:
    """Import a module that loads PyTorch, without the garbage collector looking on.

    Importing makes half a million objects that stay until the end. The collector would go through
    them several times on the way and once more at the exit; from then on it leaves them out.
    Does nothing in a process that has PyTorch already, whose collector is its owner's.
    """
    if "torch" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        import_module(module)
        gc.freeze()
        # some libraries (nanobind's, in Triton 3.9) print what they find uncollected at the end
        atexit.register(gc.unfreeze)
    finally:
        gc.enable()
