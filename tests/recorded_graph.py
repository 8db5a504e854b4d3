"""In the place of CUDA graphs on a CPU: operations recorded, and replayed on the same memory.

What a graph does not do, this does not either: Python is not run again, numbers stay what they were
at the capture, each operation reads and writes the memory that it did then. Not in it: streams,
what CUDA refuses to capture, and the sharing of memory between graphs.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storages(tree):
    return {tensor.untyped_storage()._cdata for tensor in _tensors(tree)}


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def made(self):
        """The tensors that operations made, with the call of each; no views, nothing in place."""
        for number, (_, args, kwargs, result) in enumerate(self.calls):
            given = _storages((args, kwargs))
            for place, tensor in enumerate(_tensors(result)):
                if tensor.untyped_storage()._cdata not in given:
                    yield number, place, tensor


class RecordedCapture:
    """`replays`: how often any of its graphs was replayed."""

    def __init__(self):
        self.replays = 0

    def warm_up(self, work):
        work()

    def __call__(self, work):
        with _Recorder() as recorder:
            result = work()
        made = {(number, place): tensor for number, place, tensor in recorder.made()}
        for tensor in made.values():  # a capture computes nothing
            if tensor.is_floating_point():
                tensor.data.fill_(torch.nan)  # unseen by autograd

        def replay():
            self.replays += 1
            # what was recorded is below both
            with torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
                for number, (func, args, kwargs, _) in enumerate(recorder.calls):
                    for place, tensor in enumerate(_tensors(func(*args, **kwargs))):
                        if (number, place) in made:
                            made[number, place].copy_(tensor)

        return result, replay
